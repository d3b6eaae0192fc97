use candle_core::{Device, Result, Tensor};

use super::*;
use crate::ModelConfig;
use crate::cpu::HostCache;
use crate::ops::attend_stock;
use crate::ops::testing::{assert_close, random};

fn floats(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

/// A prefill of 60 tokens behind two, and a decode step behind 35, in blocks that lie scattered. With positions that turn
/// nothing, so that candle's attention says the same.
fn check(shape: AttentionShape) -> Result<()> {
    let config = ModelConfig {
        num_key_value_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        ..crate::testing::config()
    };
    let mut cache = HostCache::f32(&config, 10);
    let HostCache::F32(layers) = &mut cache else {
        unreachable!()
    };
    let sequences = [(60, 2, vec![5, 9, 1, 2]), (1, 35, vec![7, 0, 3])];
    let q = random(&[61, shape.q_width()], 3)?;
    let (mut spans, mut wants, mut row, mut new) = (Vec::new(), Vec::new(), 0, [Vec::new(), Vec::new()]);
    for (i, (rows, start, blocks)) in sequences.iter().enumerate() {
        let tokens = start + rows;
        let k = random(&[tokens, shape.kv_width()], 10 + i as u64)?;
        let v = random(&[tokens, shape.kv_width()], 20 + i as u64)?;
        let (old_k, old_v) = (floats(&k.narrow(0, 0, *start)?)?, floats(&v.narrow(0, 0, *start)?)?);
        for (at, (k, v)) in old_k
            .chunks(shape.head_dim)
            .zip(old_v.chunks(shape.head_dim))
            .enumerate()
        {
            let (position, head) = (at / shape.kv_heads, at % shape.kv_heads);
            // SAFETY: one thread.
            unsafe { layers[0].shared() }.write((blocks[position / 16], position % 16), head, k, v);
        }
        for (all, x) in new.iter_mut().zip([&k, &v]) {
            all.extend(floats(&x.narrow(0, *start, *rows)?)?);
        }
        wants.push(attend_stock(&q.narrow(0, row, *rows)?, &k, &v, *start, shape)?);
        spans.push(Span {
            row,
            rows: *rows,
            start: *start,
            blocks,
        });
        row += rows;
    }
    let q = floats(&q)?;
    let attention = Attention {
        q: &q,
        lasts: false,
        k: &new[0],
        v: &new[1],
        norms: None,
        eps: 0.0,
        rope: &RopeTable::new(&vec![0.0; shape.head_dim / 2], 100),
        shape,
    };
    let mut got = vec![0f32; 61 * shape.q_width()];
    attend(&attention, &mut cache, 0, &spans, &mut got);

    // The last tokens of both alone: the very bits.
    let width = shape.q_width();
    let lasts = Attention {
        q: &q[59 * width..],
        lasts: true,
        ..attention
    };
    let mut got_lasts = vec![0f32; 2 * width];
    attend(&lasts, &mut cache, 0, &spans, &mut got_lasts);
    assert_eq!(got_lasts, got[59 * width..]);
    let got = Tensor::from_vec(got, (61, shape.q_width()), &Device::Cpu)?;
    assert_close(&got, &Tensor::cat(&wants, 0)?, 1e-5)
}

#[test]
fn scattered_blocks_attend_as_whole_sequences() -> Result<()> {
    for (heads, kv_heads, head_dim) in [(4, 2, 8), (3, 3, 20), (8, 1, 16), (6, 6, 96), (7, 7, 144)] {
        for window in [None, Some(3), Some(20)] {
            check(AttentionShape {
                heads,
                kv_heads,
                head_dim,
                window,
            })?;
        }
    }
    Ok(())
}

#[test]
fn a_token_attends_alike_as_part_of_a_prompt_and_by_itself() -> Result<()> {
    let shape = AttentionShape {
        heads: 6,
        kv_heads: 6,
        head_dim: 32,
        window: None,
    };
    let config = ModelConfig {
        num_key_value_heads: 6,
        head_dim: 32,
        ..crate::testing::config()
    };
    let [q, k, v] = [random(&[40, 192], 1)?, random(&[40, 192], 2)?, random(&[40, 192], 3)?];
    let [q, k, v] = [floats(&q)?, floats(&k)?, floats(&v)?];
    let rope = RopeTable::new(&[1.0 / 7.0; 16], 40);
    let norm = floats(&random(&[32], 4)?)?;
    let run = |mut cache: HostCache, parts: &[usize]| {
        let (mut out, mut start) = (Vec::new(), 0);
        for &rows in parts {
            let part = |x: &[f32]| x[start * 192..(start + rows) * 192].to_vec();
            let attention = Attention {
                q: &part(&q),
                lasts: false,
                k: &part(&k),
                v: &part(&v),
                norms: Some((&norm, &norm)),
                eps: 1e-5,
                rope: &rope,
                shape,
            };
            let blocks = [2, 0, 1];
            let span = Span {
                row: 0,
                rows,
                start,
                blocks: &blocks,
            };
            let mut rows_out = vec![0f32; rows * 192];
            attend(&attention, &mut cache, 0, &[span], &mut rows_out);
            out.extend(rows_out);
            start += rows;
        }
        out
    };
    for new in [HostCache::f32, HostCache::f16] {
        let cache = || new(&config, 3);
        assert_eq!(run(cache(), &[40]), run(cache(), &[1; 40]), "the very bits");
    }
    Ok(())
}
