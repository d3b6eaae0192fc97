//! Random sharded checkpoints in every format, small or large.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::support::workspace;

/// The bundled model's, whose tokenizer it gets.
const VOCAB: usize = 1024;

/// How the weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Safetensors,
    Bin,
}

/// A checkpoint to be made.
#[derive(Debug, Clone, Copy)]
pub struct Checkpoint {
    pub format: Format,
    pub dtype: DType,
    pub hidden: usize,
    pub layers: usize,
    pub shards: usize,
}

/// What came of it, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub largest_shard: u64,
    /// All parameters in f32.
    pub model_f32: u64,
}

/// Names and shapes in the order of the layers.
pub fn shapes(hidden: usize, layers: usize) -> Vec<(String, Vec<usize>)> {
    let intermediate = intermediate(hidden);
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, hidden])];
    for layer in 0..layers {
        let mut add = |name: &str, shape: &[usize]| {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        };
        for projection in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            add(&format!("self_attn.{projection}"), &[hidden, hidden]);
        }
        add("mlp.gate_proj", &[intermediate, hidden]);
        add("mlp.up_proj", &[intermediate, hidden]);
        add("mlp.down_proj", &[hidden, intermediate]);
        add("input_layernorm", &[hidden]);
        add("post_attention_layernorm", &[hidden]);
    }
    shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
    shapes
}

/// As in models of 1 to 7 billion parameters.
fn intermediate(hidden: usize) -> usize {
    hidden * 11 / 4
}

/// The tensors in shards of about the same size.
fn shared(shapes: &[(String, Vec<usize>)], shards: usize) -> Vec<Vec<(String, Vec<usize>)>> {
    let size = |shape: &[usize]| shape.iter().product::<usize>();
    let total: usize = shapes.iter().map(|(_, shape)| size(shape)).sum();
    let (mut shared, mut before) = (vec![Vec::new(); shards], 0);
    for (name, shape) in shapes {
        shared[before * shards / total].push((name.clone(), shape.clone()));
        before += size(shape);
    }
    shared
}

impl Checkpoint {
    /// Writes the folder. The values depend on the tensor's place alone, so every format of one dtype holds the same.
    pub fn write(&self, folder: &Path) -> Result<Sizes> {
        let tiny = workspace().join("data/tiny");
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            fs::copy(tiny.join(name), folder.join(name))?;
        }
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": VOCAB, "hidden_size": self.hidden,
            "intermediate_size": intermediate(self.hidden),
            "num_hidden_layers": self.layers, "num_attention_heads": self.hidden / 64, "tie_word_embeddings": true,
            "max_position_embeddings": 1024, "eos_token_id": 1,
        });
        fs::write(folder.join("config.json"), config.to_string())?;
        let shapes = shapes(self.hidden, self.layers);
        let mut sizes = Sizes {
            largest_shard: 0,
            model_f32: shapes
                .iter()
                .map(|(_, shape)| 4 * shape.iter().product::<usize>() as u64)
                .sum(),
        };
        let mut weight_map = BTreeMap::new();
        for (n, part) in shared(&shapes, self.shards).iter().enumerate() {
            let (stem, extension) = self.names();
            let file = format!("{stem}-{:05}-of-{:05}.{extension}", n + 1, self.shards);
            let tensors: Vec<(&str, &[usize], Vec<u8>)> = part
                .iter()
                .map(|(name, shape)| {
                    (
                        name.as_str(),
                        shape.as_slice(),
                        self.values(name, shape.iter().product()),
                    )
                })
                .collect();
            match self.format {
                Format::Safetensors => self.write_safetensors(&folder.join(&file), &tensors)?,
                Format::Bin => self.write_bin(&folder.join(&file), &tensors)?,
            }
            sizes.largest_shard = sizes.largest_shard.max(fs::metadata(folder.join(&file))?.len());
            weight_map.extend(part.iter().map(|(name, _)| (name.clone(), file.clone())));
        }
        let (stem, extension) = self.names();
        let index = serde_json::json!({ "weight_map": weight_map }).to_string();
        fs::write(folder.join(format!("{stem}.{extension}.index.json")), index)?;
        Ok(sizes)
    }

    fn names(&self) -> (&'static str, &'static str) {
        match self.format {
            Format::Safetensors => ("model", "safetensors"),
            Format::Bin => ("pytorch_model", "bin"),
        }
    }

    /// Little-endian values between -0.04 and 0.04, by xorshift.
    fn values(&self, name: &str, n: usize) -> Vec<u8> {
        let mut state = name
            .bytes()
            .fold(88_172_645_463_325_252u64, |h, b| h.wrapping_mul(31) ^ u64::from(b));
        let mut bytes = Vec::with_capacity(n * self.dtype.size_in_bytes());
        for _ in 0..n {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let value = ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.08;
            match self.dtype {
                // The upper half of an f32 is a bf16.
                DType::BF16 => bytes.extend(&value.to_le_bytes()[2..]),
                _ => bytes.extend(value.to_le_bytes()),
            }
        }
        bytes
    }

    fn write_safetensors(&self, path: &Path, tensors: &[(&str, &[usize], Vec<u8>)]) -> Result<()> {
        let tensor = |(name, shape, bytes): &(&str, &[usize], Vec<u8>)| {
            Ok((
                (*name).to_owned(),
                Tensor::from_raw_buffer(bytes, self.dtype, shape, &Device::Cpu)?,
            ))
        };
        let tensors: HashMap<String, Tensor> = tensors.iter().map(tensor).collect::<Result<_>>()?;
        Ok(candle_core::safetensors::save(&tensors, path)?)
    }

    /// As `torch.save` packs a state dict: a pickle of what the tensors are, a file of values for each.
    fn write_bin(&self, path: &Path, tensors: &[(&str, &[usize], Vec<u8>)]) -> Result<()> {
        let mut zip = ZipWriter::new(BufWriter::new(File::create(path)?));
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        zip.start_file("archive/data.pkl", stored)?;
        zip.write_all(&self.pickle(tensors))?;
        for (key, (_, _, bytes)) in tensors.iter().enumerate() {
            zip.start_file(format!("archive/data/{key}"), stored)?;
            zip.write_all(bytes)?;
        }
        zip.start_file("archive/version", stored)?;
        zip.write_all(b"3\n")?;
        zip.finish()?.flush()?;
        Ok(())
    }

    fn pickle(&self, tensors: &[(&str, &[usize], Vec<u8>)]) -> Vec<u8> {
        fn text(out: &mut Vec<u8>, text: &str) {
            out.push(b'X');
            out.extend((text.len() as u32).to_le_bytes());
            out.extend(text.as_bytes());
        }
        fn int(out: &mut Vec<u8>, value: usize) {
            out.push(b'J');
            out.extend((value as u32).to_le_bytes());
        }
        const ORDERED_DICT: &[u8] = b"ccollections\nOrderedDict\n)R";
        let storage: &[u8] = match self.dtype {
            DType::BF16 => b"ctorch\nBFloat16Storage\n",
            _ => b"ctorch\nFloatStorage\n",
        };
        let mut out = [b"\x80\x02", ORDERED_DICT, b"("].concat();
        for (key, (name, shape, _)) in tensors.iter().enumerate() {
            text(&mut out, name);
            out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
            text(&mut out, "storage");
            out.extend(storage);
            text(&mut out, &key.to_string());
            text(&mut out, "cpu");
            int(&mut out, shape.iter().product());
            // The storage by its description, from element 0 on; size, stride, no gradient, no hooks.
            out.extend(b"tQK\0(");
            shape.iter().for_each(|&size| int(&mut out, size));
            out.extend(b"t(");
            (1..=shape.len()).for_each(|i| int(&mut out, shape[i..].iter().product()));
            out.extend(b"t\x89");
            out.extend(ORDERED_DICT);
            out.extend(b"tR");
        }
        out.extend(b"u.");
        out
    }
}
