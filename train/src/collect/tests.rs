//! Collections that are stopped, resumed, and fed what does not fit.

use std::path::Path;

use lengthwise_core::{DecodeError, Decoder, FinishReason, Prompt, Refusal, Request, Response};
use proptest::prelude::*;

use super::*;
use crate::files::read_lengths;

/// [`CollectJob::run`] where an instruction that is too long is an error.
fn collect(
    instructions: &[InstructionRecord],
    decoder: &mut dyn Decoder,
    config: &CollectConfig,
    output: &Path,
    progress: &mut dyn FnMut(CollectProgress),
) -> Result<Vec<LengthRecord>, CollectError> {
    let job = CollectJob {
        instructions,
        config,
        output,
        skip_too_long: false,
    };
    Ok(job.run(decoder, progress)?.records)
}

/// Answers with a length that depends on the seed alone, in reverse order, and fails after `left` responses. Like the
/// local decoder it checks every prompt first.
struct Seeded {
    left: usize,
    max_prompt: usize,
    /// Requests of which no answer is given.
    loses: &'static str,
    /// Instructions that are refused, as a server may.
    refuses: &'static [&'static str],
    /// Requests of every call.
    calls: Vec<usize>,
}

impl Seeded {
    fn new(left: usize) -> Self {
        Self {
            left,
            max_prompt: usize::MAX,
            loses: "nothing",
            refuses: &[],
            calls: Vec::new(),
        }
    }
}

impl Decoder for Seeded {
    fn decode(
        &mut self,
        requests: Vec<Request>,
        on_response: &mut dyn FnMut(Response) -> Result<(), DecodeError>,
    ) -> Result<(), DecodeError> {
        self.calls.push(requests.len());
        let length = |request: &Request| request.prompt.messages()[0].content.len();
        if let Some(request) = requests.iter().find(|r| length(r) > self.max_prompt) {
            return Err(DecodeError::PromptTooLong {
                id: request.id.clone(),
                got: length(request),
                max: self.max_prompt,
            });
        }
        let mut refusals = Vec::new();
        for request in requests.into_iter().rev().filter(|r| r.id.as_str() != self.loses) {
            let instruction = request.id.as_str().split('#').next().unwrap_or_default();
            if self.refuses.contains(&instruction) {
                refusals.push(Refusal {
                    id: request.id,
                    reason: "no".to_owned(),
                });
                continue;
            }
            if self.left == 0 {
                return Err(DecodeError::model("killed"));
            }
            self.left -= 1;
            on_response(Response {
                id: request.id,
                text: format!("text {}", request.sampling.seed),
                tokens: (request.sampling.seed % 100) as u32 + 1,
                finish: FinishReason::Stop,
            })?;
        }
        match refusals.is_empty() {
            true => Ok(()),
            false => Err(DecodeError::Refused {
                endpoint: "e".to_owned(),
                refusals,
            }),
        }
    }
}

fn instructions(n: usize) -> Vec<InstructionRecord> {
    let record = |i: usize| InstructionRecord {
        id: i.to_string().into(),
        prompt: Prompt::Instruction(format!("say {i}")),
        batch: None,
    };
    (0..n).map(record).collect()
}

fn config() -> CollectConfig {
    CollectConfig {
        model: "m".to_owned(),
        dtype: Some("f32".to_owned()),
        kv_cache_dtype: Some("f32".to_owned()),
        temperatures: vec![0.0, 0.7],
        top_p: 1.0,
        top_k: 0,
        samples_per_temperature: 2,
        max_new_tokens: 100,
        seed: 1,
        save_text: false,
    }
}

fn run(decoder: &mut Seeded, config: &CollectConfig, n: usize, output: &Path) -> Result<Vec<LengthRecord>, String> {
    collect(&instructions(n), decoder, config, output, &mut |_| {}).map_err(|err| err.to_string())
}

#[test]
fn a_run_stopped_anywhere_and_resumed_writes_the_same_file() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let whole = dir.path().join("whole.jsonl");
    run(&mut Seeded::new(usize::MAX), &config(), 20, &whole).expect("undisturbed");
    let want = std::fs::read_to_string(&whole)?;
    // Temperature 0 is sampled once, 0.7 twice.
    let got = read_lengths(&whole)?;
    assert_eq!(
        got[0].samples.iter().map(|s| s.temperature).collect::<Vec<_>>(),
        [0.0, 0.7, 0.7]
    );
    assert_ne!(
        got[0].samples[1].tokens, got[0].samples[2].tokens,
        "each sample has its own seed"
    );
    let output = dir.path().join("killed.jsonl");
    let mut runs = 0;
    while let Err(err) = run(&mut Seeded::new(17), &config(), 20, &output) {
        assert!(err.contains("killed"), "{err}");
        assert!(!output.exists());
        runs += 1;
    }
    assert_eq!(runs, 3, "each run must keep what it finished");
    assert_eq!(std::fs::read_to_string(&output)?, want);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_journal_cut_at_any_byte_gives_the_undisturbed_file(left in 0usize..30, kept in 0.0..=1.0) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (whole, killed) = (dir.path().join("whole.jsonl"), dir.path().join("killed.jsonl"));
        let config = CollectConfig { save_text: true, ..config() };
        run(&mut Seeded::new(usize::MAX), &config, 8, &whole).expect("undisturbed");
        if run(&mut Seeded::new(left), &config, 8, &killed).is_err() {
            let partial = dir.path().join("killed.jsonl.partial");
            let bytes = std::fs::read(&partial).expect("there");
            let cut = (bytes.len() as f64 * kept) as usize;
            std::fs::write(&partial, &bytes[..cut]).expect("written");
            let items = bytes[..cut].iter().filter(|b| **b == b'\n').count().saturating_sub(1);
            let mut decoder = Seeded::new(usize::MAX);
            run(&mut decoder, &config, 8, &killed).expect("resumed");
            // What was finished is not sampled again.
            prop_assert_eq!(decoder.calls, vec![(8 - items) * 3]);
        }
        prop_assert_eq!(std::fs::read(&killed).expect("there"), std::fs::read(&whole).expect("there"));
    }
}

#[test]
fn another_input_or_other_settings_are_told_from_a_resumed_run() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("out.jsonl");
    run(&mut Seeded::new(9), &config(), 20, &output).expect_err("stopped");
    let err = run(&mut Seeded::new(9), &config(), 10, &output).expect_err("other input");
    assert!(err.contains("belongs to another input"), "{err}");
    let mut changed = instructions(20);
    changed[19].prompt = Prompt::Instruction("say something else".to_owned());
    let err = collect(&changed, &mut Seeded::new(9), &config(), &output, &mut |_| {}).expect_err("another text");
    assert!(err.to_string().contains("holds instruction 19"), "{err}");
    let others = [
        (CollectConfig { seed: 2, ..config() }, "seed 1, now 2"),
        (
            CollectConfig {
                model: "n".to_owned(),
                ..config()
            },
            "model \"m\", now \"n\"",
        ),
        (
            CollectConfig {
                temperatures: vec![0.0],
                ..config()
            },
            "temperatures [0.0,0.7], now [0.0]",
        ),
        (
            CollectConfig {
                max_new_tokens: 64,
                ..config()
            },
            "max_new_tokens 100, now 64",
        ),
        (
            CollectConfig {
                dtype: Some("bf16".to_owned()),
                ..config()
            },
            "dtype \"f32\", now \"bf16\"",
        ),
    ];
    for (other, want) in others {
        let err = run(&mut Seeded::new(9), &other, 20, &output).expect_err("other settings");
        assert!(err.contains(want), "{err}, want {want}");
    }
    Ok(())
}

#[test]
fn a_prompt_that_is_too_long_is_named_or_left_out() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("out.jsonl");
    let mut decoder = Seeded {
        max_prompt: 5,
        ..Seeded::new(usize::MAX)
    };
    let err = run(&mut decoder, &config(), 12, &output).expect_err("too long");
    assert!(
        err.starts_with("instruction 10: the prompt has 6 tokens, the model takes at most 5"),
        "{err}"
    );
    assert_eq!(decoder.left, usize::MAX, "nothing was decoded");
    let (instructions, config) = (instructions(12), config());
    let job = CollectJob {
        instructions: &instructions,
        config: &config,
        output: &output,
        skip_too_long: true,
    };
    let mut last = None;
    let summary = job.run(&mut decoder, &mut |p| last = Some(p))?;
    assert_eq!(summary.too_long, ["10".into(), "11".into()]);
    assert_eq!((summary.records.len(), summary.resumed), (10, 0));
    assert_eq!(read_lengths(&output)?, summary.records);
    assert_eq!(
        last.map(|p| (p.done, p.total, p.tokens)),
        Some((10, 12, summary.tokens))
    );
    Ok(())
}

#[test]
fn a_lost_answer_is_an_error_and_costs_one_instruction() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("out.jsonl");
    let mut decoder = Seeded {
        loses: "1#t0.7#0",
        ..Seeded::new(usize::MAX)
    };
    let err = run(&mut decoder, &config(), 3, &output).expect_err("lost");
    assert!(err.starts_with("instruction 1 got 2 of its 3 samples"), "{err}");
    assert!(!output.exists());
    let mut decoder = Seeded::new(usize::MAX);
    run(&mut decoder, &config(), 3, &output).expect("resumed");
    assert_eq!(decoder.calls, [3]);
    Ok(())
}

#[test]
fn what_cannot_be_sampled_is_refused_before_a_file_is_made() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("out.jsonl");
    let cases = [
        (
            CollectConfig {
                temperatures: vec![],
                ..config()
            },
            "nothing to sample",
        ),
        (
            CollectConfig {
                temperatures: vec![-0.5],
                ..config()
            },
            "nothing to sample",
        ),
        (
            CollectConfig {
                samples_per_temperature: 0,
                ..config()
            },
            "nothing to sample",
        ),
        (
            CollectConfig {
                max_new_tokens: 0,
                ..config()
            },
            "nothing to sample",
        ),
        (
            CollectConfig {
                temperatures: vec![0.7, 0.0, 0.7],
                ..config()
            },
            "temperature 0.7 is given twice",
        ),
    ];
    for (config, want) in cases {
        let err = run(&mut Seeded::new(9), &config, 2, &output).expect_err("refused");
        assert!(err.contains(want), "{err}, want {want}");
    }
    assert_eq!(std::fs::read_dir(dir.path())?.count(), 0);
    Ok(())
}

#[test]
fn what_a_server_refuses_is_left_out_unless_it_refuses_everything() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("out.jsonl");
    let (instructions, config) = (instructions(5), config());
    let job = CollectJob {
        instructions: &instructions,
        config: &config,
        output: &output,
        skip_too_long: false,
    };
    let mut decoder = Seeded {
        refuses: &["1", "3"],
        ..Seeded::new(usize::MAX)
    };
    let summary = job.run(&mut decoder, &mut |_| {})?;
    assert_eq!(summary.refused, ["1".into(), "3".into()]);
    assert_eq!(decoder.calls, [15], "what is accepted is asked for once");
    let ids: Vec<_> = read_lengths(&output)?.into_iter().map(|record| record.id).collect();
    assert_eq!(ids, ["0".into(), "2".into(), "4".into()]);
    let none = dir.path().join("none.jsonl");
    let mut decoder = Seeded {
        refuses: &["0", "1", "2", "3", "4"],
        ..Seeded::new(usize::MAX)
    };
    let err = run(&mut decoder, &config, 5, &none).expect_err("nothing was accepted");
    assert!(err.starts_with("the server refused every instruction"), "{err}");
    assert!(!none.exists());
    Ok(())
}

#[test]
fn an_engines_failure_names_the_instruction() -> anyhow::Result<()> {
    struct Failing;
    impl Decoder for Failing {
        fn decode(
            &mut self,
            requests: Vec<Request>,
            _: &mut dyn FnMut(Response) -> Result<(), DecodeError>,
        ) -> Result<(), DecodeError> {
            Err(DecodeError::Endpoint {
                id: requests[4].id.clone(),
                endpoint: "e".to_owned(),
                reason: "no key".to_owned(),
            })
        }
    }
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("out.jsonl");
    // Three samples of each instruction.
    let err = collect(&instructions(2), &mut Failing, &config(), &output, &mut |_| {}).expect_err("failed");
    assert_eq!(err.to_string(), "instruction 1: e: no key");
    Ok(())
}
