//! The layer as one operation against the same layer in candle's operations.

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};

use super::{Read, Training};
use crate::ModelConfig;
use crate::cpu::{Scratch, Sequences};
use crate::lora::{AdaptedRows, Dropout};
use crate::network::pass::{Attention, Pass};
use crate::ops::testing::{assert_close, random};

/// Lengths and positions of the packed sequences.
const LENGTHS: [usize; 3] = [21, 1, 7];

struct Case {
    config: ModelConfig,
    modules: &'static str,
    /// Where the adapter begins in each sequence, in place of everywhere.
    active_from: Option<[usize; 3]>,
    dropout: f64,
    /// Packed rows that are read.
    rows: Option<Vec<u32>>,
    checkpointing: bool,
}

impl Case {
    fn new(config: ModelConfig, modules: &'static str) -> Self {
        Self {
            config,
            modules,
            active_from: None,
            dropout: 0.0,
            rows: None,
            checkpointing: false,
        }
    }

    /// Output and every gradient are those of `Block::forward`.
    fn check(&self) -> anyhow::Result<()> {
        let llama = crate::testing::network(&self.config)?;
        let adapter = crate::testing::adapter_of(&llama, self.modules)?;
        let input = Var::from_tensor(&random(&[29, self.config.hidden_size], 7)?)?;
        let positions: Arc<[u32]> = LENGTHS.iter().flat_map(|&n| 0..n as u32).collect();
        let block = &llama.blocks[0];
        assert!(block.runs_on_host());

        let rows = self
            .rows
            .as_ref()
            .map(|r| Tensor::new(r.as_slice(), &Device::Cpu))
            .transpose()?;
        let adapted = self.active_from.and_then(|from| {
            let read = self.rows.iter().flatten().map(|&row| row as usize);
            AdaptedRows::new(LENGTHS.into_iter().zip(from), read)
        });
        // The layer draws a seed of its own from the pass's generator.
        let outer = Dropout::new(self.dropout, 3);
        let forked = outer.fork().map(|(p, seed)| Dropout::new(p, seed));
        let pass = Pass {
            positions: positions.clone(),
            rope: &llama.rope,
            adapter: Some(&adapter),
            adapted: adapted.as_ref().map(|rows| rows.on(&Device::Cpu)).transpose()?,
            dropout: forked.as_ref(),
            attention: Attention::Packed(LENGTHS.as_slice().into()),
        };
        let want = block.forward(input.as_tensor(), 0, &pass, rows.as_ref())?;

        let outer = Dropout::new(self.dropout, 3);
        let scratch = Arc::new(Scratch::default());
        let training = Training {
            positions,
            rope: &llama.rope,
            adapter: Some(&adapter),
            adapted: adapted.map(Arc::new),
            dropout: Some(&outer),
            checkpointing: self.checkpointing,
            scratch: &scratch,
        };
        let read = Read {
            sequences: Arc::new(match &self.rows {
                Some(rows) => Sequences::asked(&LENGTHS, rows),
                None => Sequences::new(&LENGTHS),
            }),
            rows: self.rows.as_deref().map(Into::into),
        };
        let blocks = std::slice::from_ref(block);
        let got = training.run(blocks, 0, input.as_tensor(), [&read; 2])?;
        assert_close(&got, &want, 2e-5)?;
        let weights = random(want.dims(), 9)?;
        let (got, want) = ((got * &weights)?.sum_all()?, (want * &weights)?.sum_all()?);
        let (first, again, want) = (got.backward()?, got.backward()?, want.backward()?);
        let mut variables = adapter.tensors();
        variables.retain(|name, _| name.contains("layers.0."));
        variables.insert("input".to_owned(), input.as_tensor().clone());
        for (name, variable) in variables {
            let want = want
                .get(&variable)
                .unwrap_or_else(|| panic!("{name}: no gradient to compare with"));
            // The second time nothing is kept any more, and the layer runs again.
            for grads in [&first, &again] {
                let got = grads.get(&variable).unwrap_or_else(|| panic!("{name} has no gradient"));
                assert_close(got, want, 1e-4)?;
            }
        }
        // Nothing below wants a gradient: the factors' are the same.
        let below = training.run(blocks, 0, &input.as_tensor().detach(), [&read; 2])?;
        let grads = (below * &weights)?.sum_all()?.backward()?;
        for (name, variable) in adapter.tensors() {
            if let (Some(want), 0.0) = (want.get(&variable), self.dropout) {
                let got = grads.get(&variable).unwrap_or_else(|| panic!("{name} has no gradient"));
                assert_close(got, want, 1e-4)?;
            }
        }
        Ok(())
    }
}

#[test]
fn any_choice_of_modules_gets_the_gradients_of_the_composed_layer() -> anyhow::Result<()> {
    for modules in ["q_proj,v_proj", "all-linear", "k_proj", "down_proj", "o_proj,gate_proj"] {
        Case::new(crate::testing::config(), modules).check()?;
    }
    Ok(())
}

#[test]
fn every_kind_of_model_gets_them() -> anyhow::Result<()> {
    let plain = crate::testing::config();
    let kinds = [
        ModelConfig {
            attention_bias: true,
            ..plain.clone()
        },
        ModelConfig {
            qk_norm: true,
            ..plain.clone()
        },
        ModelConfig {
            sliding_window: Some(4),
            num_key_value_heads: 1,
            ..plain
        },
    ];
    for config in kinds {
        Case::new(config, "all-linear").check()?;
    }
    Ok(())
}

#[test]
fn rows_that_are_not_read_cost_nothing_and_change_nothing() -> anyhow::Result<()> {
    for modules in ["q_proj,v_proj", "all-linear"] {
        let mut case = Case::new(crate::testing::config(), modules);
        case.rows = Some(vec![3, 19, 20, 28]);
        case.check()?;
        case.config.qk_norm = true;
        case.check()?;
    }
    Ok(())
}

#[test]
fn rows_that_the_adapter_leaves_alone_give_its_factors_no_gradient() -> anyhow::Result<()> {
    for modules in ["q_proj,v_proj", "all-linear"] {
        let mut case = Case::new(crate::testing::config(), modules);
        case.active_from = Some([12, usize::MAX, 2]);
        case.check()?;
        case.rows = Some(vec![3, 19, 20, 28]);
        case.check()?;
        // Without rows, of which the two layers drop others.
        case.rows = None;
        case.dropout = 0.3;
        case.checkpointing = true;
        case.check()?;
    }
    Ok(())
}

#[test]
fn dropout_drops_the_same_forward_backward_and_in_the_composed_layer() -> anyhow::Result<()> {
    for checkpointing in [false, true] {
        let mut case = Case::new(crate::testing::config(), "all-linear");
        case.dropout = 0.3;
        case.checkpointing = checkpointing;
        case.check()?;
    }
    Ok(())
}

/// The factors' gradients of all layers, of a pass whose input wants a gradient, and with it every row, or does not.
fn of_all_layers(case: &Case, input: &Tensor) -> anyhow::Result<Vec<(String, Tensor)>> {
    let llama = crate::testing::network(&case.config)?;
    let adapter = crate::testing::adapter_of(&llama, case.modules)?;
    let rows = case.rows.as_deref().expect("some rows are read");
    let from = case.active_from.expect("the adapter begins somewhere");
    let read = rows.iter().map(|&row| row as usize);
    let scratch = Arc::new(Scratch::default());
    let training = Training {
        positions: LENGTHS.iter().flat_map(|&n| 0..n as u32).collect(),
        rope: &llama.rope,
        adapter: Some(&adapter),
        adapted: AdaptedRows::new(LENGTHS.into_iter().zip(from), read).map(Arc::new),
        dropout: Some(&Dropout::new(case.dropout, 3)),
        checkpointing: case.checkpointing,
        scratch: &scratch,
    };
    let all = Read {
        sequences: Arc::new(Sequences::new(&LENGTHS)),
        rows: None,
    };
    let last = Read {
        sequences: Arc::new(Sequences::asked(&LENGTHS, rows)),
        rows: Some(rows.into()),
    };
    let output = training.run(&llama.blocks, 0, input, [&all, &last])?;
    let loss = (&output * random(output.dims(), 9)?)?.sum_all()?;
    let (_, grads) = (loss.backward()?, loss.backward()?);
    let grad = |(name, variable)| Ok((name, grads.get(&variable).expect("a gradient").clone()));
    adapter.tensors().into_iter().map(grad).collect()
}

/// A row is read behind the adapter's beginning, one before it, and one of a sequence without it.
#[test]
fn a_backward_pass_within_the_adapters_rows_gives_its_factors_the_same_gradients() -> anyhow::Result<()> {
    let plain = crate::testing::config();
    assert!(plain.num_hidden_layers > 1);
    let grouped = ModelConfig {
        qk_norm: true,
        num_key_value_heads: 1,
        sliding_window: Some(4),
        ..plain.clone()
    };
    for config in [plain, grouped] {
        for (modules, dropout) in [("q_proj,v_proj", 0.3), ("all-linear", 0.0), ("k_proj,down_proj", 0.3)] {
            for checkpointing in [false, true] {
                let mut case = Case::new(config.clone(), modules);
                case.active_from = Some([12, usize::MAX, 2]);
                case.rows = Some(vec![3, 19, 20, 21, 28]);
                (case.dropout, case.checkpointing) = (dropout, checkpointing);
                let input = Var::from_tensor(&random(&[29, config.hidden_size], 7)?)?;
                let all = of_all_layers(&case, input.as_tensor())?;
                for ((name, want), (_, got)) in all.iter().zip(of_all_layers(&case, &input.as_detached_tensor())?) {
                    assert_close(&got, want, 1e-5).map_err(|err| anyhow::anyhow!("{name}: {err}"))?;
                }
            }
        }
    }
    Ok(())
}
