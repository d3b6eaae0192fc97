//! Lengths that are predicted in the decoder's own passes, by a length head on the same weights.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;

use candle_core::Device;
use lengthwise_core::{PredictInput, Prompt, RequestId};
use lengthwise_decoder::Prober;
use lengthwise_model::{Adapter, LengthHead, LoadedModel};
use lengthwise_predictor::HeadPredictor;
use lengthwise_scheduler::{AdmissionOrder, Strategy};

use crate::inputs::ScheduleArgs;
use crate::predictions::{PredictionArgs, head_predictor, predicted, scheduled_length};

/// The adapter's folder, where the decoder's passes can predict: in the order of arrival a request's length is needed when
/// its turn comes and not before, and a head takes one prefill, which any pass has room for.
pub fn folder<'a>(source: &'a PredictionArgs, schedule: &ScheduleArgs, strategy: Strategy) -> Option<&'a Path> {
    let in_order = strategy == Strategy::Continuous && schedule.order == AdmissionOrder::FirstCome;
    let folder = source.adapter.as_deref().filter(|_| in_order)?;
    LengthHead::is_in(folder).then_some(folder)
}

/// What a head is asked about.
#[derive(Clone, Copy)]
pub enum Asked<'a> {
    Prompt(&'a Prompt),
    /// Random tokens, to be timed: those that an adapter begins with are put behind them.
    Tokens(&'a [u32]),
}

/// A length head, with the requests that it is asked about.
pub struct InPasses<'a> {
    head: HeadPredictor,
    requests: HashMap<&'a RequestId, Asked<'a>>,
    cap: u32,
    admit_quantile: f64,
    /// The largest length expected of every request that has been predicted.
    largest: RefCell<HashMap<RequestId, u32>>,
}

impl<'a> InPasses<'a> {
    /// The head of `folder`. It is read on the CPU: on a GPU its product would wait for the pass that is in flight.
    ///
    /// - `cap`: of an answer, in tokens
    pub fn open(
        model: &LoadedModel,
        folder: &Path,
        requests: impl Iterator<Item = (&'a RequestId, Asked<'a>)>,
        cap: u32,
        admit_quantile: f64,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            head: head_predictor(model, folder, &Device::Cpu)?,
            requests: requests.collect(),
            cap,
            admit_quantile,
            largest: RefCell::default(),
        })
    }

    /// The largest length expected of a request; `None` where its answer came before its prediction.
    pub fn largest(&self, id: &RequestId) -> Option<u32> {
        self.largest.borrow().get(id).copied()
    }

    /// Says how many requests have been predicted, from `tokens` tokens.
    pub fn report(&self, tokens: u64) {
        let (count, of) = (self.largest.borrow().len(), self.requests.len());
        tracing::info!("{count} of {of} lengths were predicted in the decoder's passes, from {tokens} tokens");
    }
}

impl Prober for InPasses<'_> {
    fn adapter(&self) -> &Adapter {
        self.head.adapter()
    }

    fn prompt(&self, id: &RequestId) -> Option<Vec<u32>> {
        match self.requests.get(id)? {
            Asked::Prompt(prompt) => {
                let input = PredictInput {
                    prompt: (*prompt).clone(),
                    max_new_tokens: self.cap,
                };
                predicted(self.head.tokens(&input), id, self.cap)
            }
            Asked::Tokens(tokens) => Some([tokens, &self.adapter().config().invocation_tokens[..]].concat()),
        }
    }

    fn length(&self, id: &RequestId, hidden: &[f32]) -> Option<u32> {
        let estimate = predicted(self.head.read(hidden), id, self.cap)?.capped(self.cap);
        self.largest.borrow_mut().insert(id.clone(), estimate.max_tokens);
        Some(scheduled_length(&estimate, Strategy::Continuous, self.admit_quantile))
    }
}
