//! Whole checkpoints, and every way in which one can be damaged.

use super::*;

fn folder_with(tensor: &Tensor) -> anyhow::Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    let tensors = HashMap::from([("w".to_owned(), tensor.clone())]);
    candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors"))?;
    Ok(dir)
}

fn error(dir: &Path, shape: &[usize]) -> String {
    let got = Weights::open(dir, DType::F32, &Device::Cpu).and_then(|w| w.get("w", shape));
    got.expect_err("damaged").to_string()
}

#[test]
fn a_tensor_of_another_shape_is_refused_by_name() -> anyhow::Result<()> {
    let dir = folder_with(&Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?)?;
    let err = error(dir.path(), &[3, 2]);
    assert!(err.contains("w has shape [2, 3], config.json says [3, 2]"), "{err}");
    Ok(())
}

#[test]
fn nan_is_refused() -> anyhow::Result<()> {
    let dir = folder_with(&Tensor::new(&[1f32, f32::NAN], &Device::Cpu)?)?;
    assert!(error(dir.path(), &[2]).contains("not finite"));
    Ok(())
}

#[test]
fn a_truncated_file_is_named() -> anyhow::Result<()> {
    let dir = folder_with(&Tensor::zeros((20, 30), DType::F32, &Device::Cpu)?)?;
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path)?;
    for keep in [0, 4, 20, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..keep])?;
        let err = error(dir.path(), &[20, 30]);
        assert!(err.contains("model.safetensors: truncated"), "{keep} bytes: {err}");
    }
    Ok(())
}

#[test]
fn an_index_that_names_a_missing_shard_says_which() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"w": "model-00001-of-00002.safetensors"}}"#)?;
    assert!(error(dir.path(), &[1]).contains("model-00001-of-00002.safetensors"));
    std::fs::write(&index, r#"{"weight_map": {"w": "../../etc/passwd"}}"#)?;
    assert!(error(dir.path(), &[1]).contains("outside the folder"));
    Ok(())
}

#[test]
fn a_missing_tensor_is_named() -> anyhow::Result<()> {
    let dir = folder_with(&Tensor::zeros(2, DType::F32, &Device::Cpu)?)?;
    let weights = Weights::open(dir.path(), DType::F32, &Device::Cpu)?;
    assert!(weights.contains("w") && !weights.contains("v"));
    let err = weights.get("v", &[2]).expect_err("not there").to_string();
    assert_eq!(err, "tensor v is missing from the weights");
    Ok(())
}

#[test]
fn values_are_converted_and_quantised_ones_refused() -> anyhow::Result<()> {
    for dtype in [DType::BF16, DType::F16, DType::F64] {
        let dir = folder_with(&Tensor::new(&[1.5f32, -2.0], &Device::Cpu)?.to_dtype(dtype)?)?;
        let weights = Weights::open(dir.path(), DType::F32, &Device::Cpu)?;
        assert_eq!(weights.get("w", &[2])?.to_vec1::<f32>()?, [1.5, -2.0]);
    }
    let dir = folder_with(&Tensor::zeros(2, DType::U8, &Device::Cpu)?)?;
    assert!(error(dir.path(), &[2]).contains("dtype u8; supported are f32"));
    Ok(())
}

#[test]
fn a_value_too_large_for_the_dtype_is_refused() -> anyhow::Result<()> {
    let dir = folder_with(&Tensor::new(&[1e30f32], &Device::Cpu)?)?;
    let weights = Weights::open(dir.path(), DType::F16, &Device::Cpu)?;
    assert!(
        weights
            .get("w", &[1])
            .expect_err("infinite")
            .to_string()
            .contains("dtype too narrow")
    );
    Ok(())
}

#[test]
fn quantised_weights_are_refused_where_no_kernel_runs_them() -> anyhow::Result<()> {
    let weights = |dtype| Weights::from_tensors(Default::default(), dtype, &Device::Cpu);
    let err = weights(DType::BF16)
        .quantized(Some(Quantization::Q8_0))
        .map(|_| ())
        .expect_err("bf16 has no 8-bit kernel")
        .to_string();
    assert!(
        err.contains("on the cpu in f32, not on cpu in bf16") && !err.contains('\n'),
        "{err}"
    );
    let kept = weights(DType::F32).quantized(Some(Quantization::Q8_0))?;
    assert_eq!(kept.quantization(), Some(Quantization::Q8_0));
    assert!(weights(DType::BF16).quantized(None).is_ok());
    Ok(())
}

#[test]
fn a_header_longer_than_the_file_is_refused() -> anyhow::Result<()> {
    let dir = folder_with(&Tensor::zeros(2, DType::F32, &Device::Cpu)?)?;
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path)?;
    for length in [u64::MAX, 1 << 40, bytes.len() as u64] {
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        std::fs::write(&path, &bytes)?;
        assert!(error(dir.path(), &[2]).contains("model.safetensors: truncated"));
        assert!(Weights::from_bytes(bytes.clone(), DType::F32, &Device::Cpu).is_err());
    }
    Ok(())
}

#[test]
fn shards_are_found_through_their_index() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    for (name, value) in [("a", 1f32), ("b", 2.0)] {
        let tensors = HashMap::from([(name, Tensor::new(&[value], &Device::Cpu)?)]);
        candle_core::safetensors::save(&tensors, dir.path().join(format!("{name}.safetensors")))?;
    }
    let index = r#"{"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}"#;
    std::fs::write(dir.path().join("model.safetensors.index.json"), index)?;
    let weights = Weights::open(dir.path(), DType::F32, &Device::Cpu)?;
    assert_eq!(weights.get("a", &[1])?.to_vec1::<f32>()?, [1.0]);
    assert_eq!(weights.get("b", &[1])?.to_vec1::<f32>()?, [2.0]);
    Ok(())
}

#[test]
fn bytes_and_a_file_hold_the_same() -> anyhow::Result<()> {
    let dir = folder_with(&Tensor::new(&[3f32, 4.0], &Device::Cpu)?)?;
    let bytes = std::fs::read(dir.path().join("model.safetensors"))?;
    let weights = Weights::from_bytes(bytes, DType::F32, &Device::Cpu)?;
    assert!(weights.contains("w"));
    assert_eq!(weights.get("w", &[2])?.to_vec1::<f32>()?, [3.0, 4.0]);
    Ok(())
}

/// By scripts/make_model_fixtures.py: `w` is rows 1 and 2 of a [4, 3] storage that counts from 0, `b` is bf16.
const PICKLE: &[u8] = include_bytes!("../../fixtures/pytorch_model.bin");

#[test]
fn a_pytorch_checkpoint_is_read() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("pytorch_model.bin"), PICKLE)?;
    let weights = Weights::open(dir.path(), DType::F32, &Device::Cpu)?;
    assert_eq!(
        weights.get("w", &[2, 3])?.to_vec2::<f32>()?,
        [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]
    );
    assert_eq!(weights.get("b", &[2])?.to_vec1::<f32>()?, [0.5, -2.0]);
    assert!(weights.contains("b") && !weights.contains("c"));
    assert!(weights.get("w", &[3, 2]).is_err());
    Ok(())
}

#[test]
fn a_damaged_pytorch_checkpoint_is_an_error_wherever_it_is_cut() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("pytorch_model.bin");
    for keep in (0..PICKLE.len()).step_by(13) {
        std::fs::write(&path, &PICKLE[..keep])?;
        let err = error(dir.path(), &[2, 3]);
        assert!(err.contains("pytorch_model.bin: truncated"), "{keep} bytes: {err}");
    }
    // A flipped bit may hit what is not read; it must never be more than an error.
    for at in (0..PICKLE.len()).step_by(7) {
        let mut bytes = PICKLE.to_vec();
        bytes[at] ^= 0x10;
        std::fs::write(&path, &bytes)?;
        let _ = Weights::open(dir.path(), DType::F32, &Device::Cpu).and_then(|w| w.get("w", &[2, 3]));
    }
    Ok(())
}

/// A `.bin` whose pickle is `pickle`, as PyTorch packs it.
fn packed(pickle: &[u8]) -> anyhow::Result<Vec<u8>> {
    use std::io::Write;
    use zip::write::SimpleFileOptions;
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    writer.start_file("archive/data.pkl", stored)?;
    writer.write_all(pickle)?;
    Ok(writer.finish()?.into_inner())
}

fn error_of_bin(bytes: &[u8]) -> anyhow::Result<String> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("pytorch_model.bin"), bytes)?;
    let err = error(dir.path(), &[2, 3]);
    assert!(!err.contains('\n'), "{err}");
    Ok(err)
}

#[test]
fn a_pickle_that_calls_something_is_not_obeyed() -> anyhow::Result<()> {
    let marker = tempfile::tempdir()?.path().join("called");
    // os.mkdir(marker), as the value of w and as the whole.
    let mut call = b"cos\nmkdir\n(X".to_vec();
    let path = marker.to_string_lossy();
    call.extend((path.len() as u32).to_le_bytes());
    call.extend(path.as_bytes());
    call.extend(b"tR");
    let value = [&b"\x80\x02}(X\x01\0\0\0w"[..], &call, b"u."].concat();
    let whole = [&b"\x80\x02"[..], &call, b"."].concat();
    for pickle in [value, whole] {
        assert!(error_of_bin(&packed(&pickle)?)?.contains("holds no tensors"));
    }
    assert!(!marker.exists());
    Ok(())
}

#[test]
fn a_zip_bomb_is_refused_before_it_grows() -> anyhow::Result<()> {
    let mut bytes = packed(&[0; 64])?;
    // Deflated, from 64 bytes to 4 GB, in the local header and in the directory. PyTorch only ever stores.
    for (signature, method, size) in [(b"PK\x03\x04", 8, 22), (b"PK\x01\x02", 10, 24)] {
        let at = bytes.windows(4).position(|w| w == signature).expect("a header");
        bytes[at + method] = 8;
        bytes[at + size..at + size + 4].copy_from_slice(&0xFFFF_FFF0u32.to_le_bytes());
    }
    assert!(error_of_bin(&bytes)?.contains("not a PyTorch checkpoint"));
    // A text that claims 4 GB.
    assert!(error_of_bin(&packed(b"\x80\x02}X\xf0\xff\xff\xffw.")?)?.contains("not a PyTorch checkpoint"));
    Ok(())
}

#[test]
fn nan_and_a_missing_shard_of_a_pytorch_checkpoint_are_refused() -> anyhow::Result<()> {
    // The fixture's storages hold f32: 5.0 is in w alone.
    let five = PICKLE.windows(4).position(|w| w == 5f32.to_le_bytes()).expect("w");
    let mut bytes = PICKLE.to_vec();
    bytes[five..five + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let err = error_of_bin(&bytes)?;
    assert!(err.contains("not finite") || err.contains("checksum"), "{err}");

    let dir = tempfile::tempdir()?;
    std::fs::write(
        dir.path().join("pytorch_model.bin.index.json"),
        r#"{"weight_map": {"w": "pytorch_model-00001-of-00001.bin"}}"#,
    )?;
    assert!(error(dir.path(), &[2, 3]).contains("pytorch_model-00001-of-00001.bin"));
    std::fs::write(dir.path().join("pytorch_model.bin.index.json"), "{")?;
    assert!(error(dir.path(), &[2, 3]).contains("index.json: "));
    Ok(())
}
