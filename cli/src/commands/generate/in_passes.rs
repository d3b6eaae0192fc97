//! Lengths that are predicted in the decoder's own passes, by a length head on the same weights.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;

use candle_core::Device;
use lengthwise_core::{PredictInput, RequestId};
use lengthwise_decoder::Prober;
use lengthwise_model::{Adapter, LengthHead, LoadedModel};
use lengthwise_predictor::HeadPredictor;
use lengthwise_scheduler::{AdmissionOrder, Strategy};
use lengthwise_train::files::InstructionRecord;

use super::GenerateArgs;
use crate::predictions::{head_predictor, predicted, scheduled_length};

/// The adapter's folder, where the decoder's passes can predict: in the order of arrival a request's length is needed when
/// its turn comes and not before, and a head takes one prefill, which any pass has room for.
pub fn folder(args: &GenerateArgs) -> Option<&Path> {
    let source = &args.predictions;
    let in_order = args.strategy == Strategy::Continuous && args.schedule.order == AdmissionOrder::FirstCome;
    let elsewhere = source.predictor.is_some() || source.predictions.is_some();
    let folder = source.adapter.as_deref().filter(|_| in_order && !elsewhere)?;
    LengthHead::is_in(folder).then_some(folder)
}

/// A length head, with the requests that it is asked about.
pub struct InPasses<'a> {
    head: HeadPredictor,
    records: HashMap<&'a RequestId, &'a InstructionRecord>,
    cap: u32,
    admit_quantile: f64,
    /// The largest length expected of every request that has been predicted.
    largest: RefCell<HashMap<RequestId, u32>>,
}

impl<'a> InPasses<'a> {
    /// The head of `folder`. It is read on the CPU: on a GPU its product would wait for the pass that is in flight.
    pub fn open(
        model: &LoadedModel,
        folder: &Path,
        records: &[&'a InstructionRecord],
        args: &GenerateArgs,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            head: head_predictor(model, folder, &Device::Cpu)?,
            records: records.iter().map(|record| (&record.id, *record)).collect(),
            cap: args.schedule.max_new_tokens,
            admit_quantile: args.predictions.admit_quantile,
            largest: RefCell::default(),
        })
    }

    /// The largest length expected of a request; `None` where its answer came before its prediction.
    pub fn largest(&self, id: &RequestId) -> Option<u32> {
        self.largest.borrow().get(id).copied()
    }

    /// How many requests have been predicted.
    pub fn count(&self) -> usize {
        self.largest.borrow().len()
    }
}

impl Prober for InPasses<'_> {
    fn adapter(&self) -> &Adapter {
        self.head.adapter()
    }

    fn prompt(&self, id: &RequestId) -> Option<Vec<u32>> {
        let input = PredictInput {
            prompt: self.records.get(id)?.prompt.clone(),
            max_new_tokens: self.cap,
        };
        predicted(self.head.tokens(&input), self.cap)
    }

    fn length(&self, id: &RequestId, hidden: &[f32]) -> Option<u32> {
        let estimate = predicted(self.head.read(hidden), self.cap)?.capped(self.cap);
        self.largest.borrow_mut().insert(id.clone(), estimate.max_tokens);
        Some(scheduled_length(&estimate, Strategy::Continuous, self.admit_quantile))
    }
}
