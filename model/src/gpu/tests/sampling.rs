//! Tokens drawn on the device are those that the host's sampler draws.

use lengthwise_core::SamplingParams;

use super::rows::addresses;
use super::*;
use crate::Sampler;
use crate::gpu::inputs::draw_words;

/// Draws one token per row of `logits` on the device, with the next draw of each sampler.
fn draw(gpu: &Gpu, device: &Device, logits: &[Vec<f32>], samplers: &mut [Sampler]) -> Result<Vec<u32>> {
    let vocab = logits[0].len();
    let words_of: Vec<u32> = samplers
        .iter_mut()
        .flat_map(|s| draw_words(Some(s.next_draw())))
        .collect();
    let (draws, flat) = (words(&words_of, device)?, Tensor::new(logits.concat(), device)?);
    let drawn = words(&vec![7; logits.len()], device)?;
    let [d, l, w] = addresses(gpu, [&drawn, &flat, &draws])?;
    // SAFETY: the tensors have the shapes that the kernel reads and writes.
    unsafe { kernels(gpu, DType::F32).sample(d, l, w, logits.len(), vocab)? };
    device.synchronize()?;
    drawn.to_vec1()
}

#[test]
fn a_device_draws_what_the_host_draws() -> Result<()> {
    let params = |temperature: f32, top_k: u32, top_p: f32| SamplingParams {
        temperature,
        top_k,
        top_p,
        seed: 11,
    };
    let settings = [
        params(0.0, 0, 1.0),
        params(f32::NAN, 0, 1.0),
        params(1.0, 0, 1.0),
        params(0.7, 5, 1.0),
        params(1.0, 1, 1.0),
        params(1.3, 0, 0.8),
        params(1.0, 0, 0.0),
        params(0.9, 40, 0.6),
        params(0.5, 3, 0.999),
        params(1.0, 0, f32::NAN),
    ];
    on_each_device(|gpu, device| {
        for vocab in [3usize, 50, 3000] {
            for settings in settings {
                // In quarters: many tokens are equally likely.
                let logits: Vec<Vec<f32>> = (0..8u64)
                    .map(|seed| {
                        let values: Vec<f32> = random(&[vocab], seed)?.to_vec1()?;
                        Ok(values.iter().map(|v| (v * 16.0).round() / 4.0).collect())
                    })
                    .collect::<Result<_>>()?;
                let sampler = |i: usize| Sampler::at(settings, i as u64);
                let mut on_device: Vec<Sampler> = (0..8).map(sampler).collect();
                let got = draw(gpu, device, &logits, &mut on_device)?;
                for (i, (got, logits)) in got.iter().zip(&logits).enumerate() {
                    let want = sampler(i).sample(logits).expect("finite logits");
                    assert_eq!(*got, want, "{settings:?}, vocabulary {vocab}, row {i}");
                }
            }
        }
        Ok(())
    })
}

#[test]
fn values_that_are_not_finite_are_never_drawn_and_rows_without_others_say_so() -> Result<()> {
    on_each_device(|gpu, device| {
        let mixed = vec![f32::NAN, 0.5, f32::INFINITY, 0.5, f32::NEG_INFINITY];
        let none = vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::NAN];
        for temperature in [0.0, 1.0] {
            let params = SamplingParams {
                temperature,
                top_k: 0,
                top_p: 1.0,
                seed: 1,
            };
            let mut samplers: Vec<Sampler> = (0..12).map(|i| Sampler::at(params, i)).collect();
            let rows = [vec![mixed.clone(); 11], vec![none.clone()]].concat();
            let got = draw(gpu, device, &rows, &mut samplers)?;
            assert!(got[..11].iter().all(|t| *t == 1 || *t == 3), "{got:?}");
            assert_eq!(got[11], u32::MAX);
        }
        Ok(())
    })
}

#[test]
fn rows_of_which_no_token_is_wanted_keep_what_they_have() -> Result<()> {
    on_each_device(|gpu, device| {
        let (drawn, logits) = (words(&[7, 8], device)?, Tensor::new(&[0f32, 1.0, 1.0, 0.0], device)?);
        let draws = words(
            &[
                draw_words(None),
                draw_words(Some(Sampler::new(SamplingParams::GREEDY).next_draw())),
            ]
            .concat(),
            device,
        )?;
        let [d, l, w] = addresses(gpu, [&drawn, &logits, &draws])?;
        // SAFETY: the tensors have the shapes that the kernel reads and writes.
        unsafe { kernels(gpu, DType::F32).sample(d, l, w, 2, 2)? };
        device.synchronize()?;
        assert_eq!(drawn.to_vec1::<u32>()?, [7, 0]);
        Ok(())
    })
}
