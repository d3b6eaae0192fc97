//! The thread that owns the predictor, and the batches it is given.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Receiver;
use std::time::Instant;

use lengthwise_core::{LengthPredictor, PredictError};

use crate::BatchingConfig;
use crate::queue::{Answer, Job, Queued};

pub(crate) struct Worker {
    predictor: Box<dyn LengthPredictor>,
    config: BatchingConfig,
    receiver: Receiver<Queued>,
    /// Taken from the queue, but too large for the batch that was closed.
    next: Option<Job>,
}

impl Worker {
    pub fn new(predictor: Box<dyn LengthPredictor>, config: BatchingConfig, receiver: Receiver<Queued>) -> Self {
        Self {
            predictor,
            config,
            receiver,
            next: None,
        }
    }

    /// Answers until the queue is empty and nobody is left to fill it.
    pub fn run(mut self) {
        while let Some(first) = self.next.take().or_else(|| self.receive(None)) {
            let batch = self.fill(first);
            self.answer(batch);
        }
    }

    /// The next job that somebody waits for; without `until` it is waited for as long as callers remain.
    fn receive(&self, until: Option<Instant>) -> Option<Job> {
        loop {
            let (place, job) = match until {
                None => self.receiver.recv().ok(),
                // A job that waits already is taken whatever the time is.
                Some(until) => self
                    .receiver
                    .recv_timeout(until.saturating_duration_since(Instant::now()))
                    .ok(),
            }?;
            drop(place);
            metrics::gauge!("lengthwise_queue_depth").decrement(1.0);
            if let Some(job) = wanted(job) {
                return Some(job);
            }
        }
    }

    fn fill(&mut self, first: Job) -> Vec<Job> {
        let mut closes = self.closes(&first);
        let mut tokens = first.tokens();
        let mut batch = vec![first];
        while batch.len() < self.config.max_batch_requests.get() && tokens < self.config.max_batch_tokens {
            let Some(job) = self.receive(closes) else { break };
            tokens += job.tokens();
            if tokens > self.config.max_batch_tokens {
                self.next = Some(job);
                break;
            }
            closes = [closes, self.closes(&job)].into_iter().flatten().min();
            batch.push(job);
        }
        batch
    }

    /// When a batch that holds `job` waits no longer: at the latest half way to the caller's deadline, so that the other
    /// half is left for the work. `None` where that is beyond what a clock can say.
    fn closes(&self, job: &Job) -> Option<Instant> {
        let longest = job.queued.checked_add(self.config.max_wait);
        let half = |deadline: Instant| job.queued + deadline.saturating_duration_since(job.queued) / 2;
        [longest, job.deadline.map(half)].into_iter().flatten().min()
    }

    fn answer(&mut self, batch: Vec<Job>) {
        // Asked again: callers may have gone while the batch was filled.
        let batch: Vec<Job> = batch.into_iter().filter_map(wanted).collect();
        if batch.is_empty() {
            return;
        }
        metrics::histogram!("lengthwise_predict_batch_size").record(batch.len() as f64);
        let (inputs, replies): (Vec<_>, Vec<_>) = batch.into_iter().map(|job| (job.input, job.reply)).unzip();
        // A panic answers this batch and no other; the predictor goes on.
        let result = catch_unwind(AssertUnwindSafe(|| self.predictor.predict(&inputs)));
        let failure = match result {
            Ok(Ok(answers)) if answers.len() == replies.len() => {
                replies
                    .into_iter()
                    .zip(answers)
                    .for_each(|(reply, answer)| send(reply, answer));
                return;
            }
            Ok(Ok(answers)) => format!("{} answers to {} prompts", answers.len(), replies.len()),
            Ok(Err(err)) => err.to_string(),
            Err(payload) => format!("the predictor panicked: {}", text(&*payload)),
        };
        tracing::error!("a batch of {} failed: {failure}", replies.len());
        replies
            .into_iter()
            .for_each(|reply| send(reply, Err(PredictError::model(failure.clone()))));
    }
}

/// The job, unless nobody waits for it any more: then no work is done for it.
fn wanted(job: Job) -> Option<Job> {
    if job.reply.is_closed() {
        return None;
    }
    if job.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
        send(job.reply, Err(PredictError::DeadlineExceeded));
        return None;
    }
    Some(job)
}

fn send(reply: tokio::sync::oneshot::Sender<Answer>, answer: Answer) {
    if answer.as_ref().is_ok_and(|estimate| !estimate.parsed) {
        metrics::counter!("lengthwise_predict_fallback_total").increment(1);
    }
    // The caller may have gone, which is its own affair.
    let _ = reply.send(answer);
}

/// The message of a panic.
fn text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
