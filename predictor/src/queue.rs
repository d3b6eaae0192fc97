//! The callers' end of the queue: requests from many tasks wait here for the one thread that owns the predictor.

use std::num::NonZeroUsize;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lengthwise_core::{LengthEstimate, LengthPredictor, PredictError, PredictInput, Prompt};
use tokio::sync::oneshot;

use crate::count::{Count, Counted};
use crate::worker::Worker;

/// When the queue closes a batch, and how many may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchingConfig {
    /// Most requests in one batch.
    pub max_batch_requests: NonZeroUsize,
    /// Most prompt text in one batch, in tokens estimated at four bytes each; one longer request is a batch of its own.
    pub max_batch_tokens: usize,
    /// Longest time that the oldest request of a batch waits for others, and no longer than half of the time to its
    /// deadline. Those that wait already are taken at once.
    pub max_wait: Duration,
    /// Requests that may wait; beyond them callers are turned away.
    pub capacity: NonZeroUsize,
}

impl Default for BatchingConfig {
    fn default() -> Self {
        Self {
            max_batch_requests: NonZeroUsize::new(64).expect("64 is not 0"),
            max_batch_tokens: 16_384,
            max_wait: Duration::from_millis(2),
            capacity: NonZeroUsize::new(4096).expect("4096 is not 0"),
        }
    }
}

/// What the predictor says of one request.
pub(crate) type Answer = Result<LengthEstimate, PredictError>;

/// A request on its way to the worker.
pub(crate) struct Job {
    pub input: PredictInput,
    pub deadline: Option<Instant>,
    pub queued: Instant,
    pub reply: oneshot::Sender<Answer>,
}

/// A request in the queue, with the place it takes there.
pub(crate) type Queued = (Counted, Job);

impl Job {
    /// Tokens of the prompt, estimated: the queue has no tokenizer.
    pub fn tokens(&self) -> usize {
        let bytes: usize = match &self.input.prompt {
            Prompt::Instruction(text) => text.len(),
            Prompt::Chat(turns) => turns.iter().map(|turn| turn.content.len()).sum(),
        };
        bytes / 4 + 1
    }
}

/// The callers' end of the queue. The worker answers what was accepted, then ends, once every clone is dropped.
#[derive(Clone)]
pub struct PredictQueue {
    /// Without a bound of its own, so that room is made as it fills.
    sender: Sender<Queued>,
    capacity: usize,
    waiting: Count,
    unanswered: Count,
}

impl PredictQueue {
    /// Starts the worker thread that owns `predictor`.
    ///
    /// # Errors
    /// The system starts no further thread.
    pub fn start(
        predictor: Box<dyn LengthPredictor>,
        config: BatchingConfig,
    ) -> Result<(Self, JoinHandle<()>), std::io::Error> {
        let capacity = config.capacity.get();
        let (sender, receiver) = channel();
        let worker = Worker::new(predictor, config, receiver);
        let thread = std::thread::Builder::new()
            .name("predictor".to_owned())
            .spawn(move || worker.run())?;
        let queue = Self {
            sender,
            capacity,
            waiting: Count::default(),
            unanswered: Count::default(),
        };
        Ok((queue, thread))
    }

    /// The requests accepted whose callers still wait, as they are counted at any time.
    pub(crate) fn unanswered(&self) -> Count {
        self.unanswered.clone()
    }

    /// Requests that may wait.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Puts a request into the queue, without waiting. Dropping what is returned cancels it: work that is not begun is
    /// not done.
    ///
    /// # Errors
    /// The queue is full, the deadline has passed, or the worker is gone.
    pub fn submit(&self, input: PredictInput, deadline: Option<Instant>) -> Result<Pending, PredictError> {
        let queued = Instant::now();
        if deadline.is_some_and(|deadline| deadline <= queued) {
            return Err(PredictError::DeadlineExceeded);
        }
        let capacity = self.capacity;
        let place = self
            .waiting
            .add(capacity)
            .ok_or(PredictError::Overloaded { capacity })?;
        let (reply, answer) = oneshot::channel();
        // Counted before it is sent: the worker may take it at once.
        let depth = metrics::gauge!("lengthwise_queue_depth");
        depth.increment(1.0);
        let job = Job {
            input,
            deadline,
            queued,
            reply,
        };
        if self.sender.send((place, job)).is_err() {
            depth.decrement(1.0);
            return Err(PredictError::ShuttingDown);
        }
        let unanswered = self.unanswered.add(usize::MAX);
        Ok(Pending {
            answer,
            deadline,
            _unanswered: unanswered,
        })
    }

    /// [`submit`](Self::submit) and [`wait`](Pending::wait).
    ///
    /// # Errors
    /// The queue is full, the deadline passed, or the predictor failed.
    pub async fn predict(
        &self,
        input: PredictInput,
        deadline: Option<Instant>,
    ) -> Result<LengthEstimate, PredictError> {
        self.submit(input, deadline)?.wait().await
    }
}

/// A request in the queue.
#[must_use = "dropping it cancels the request"]
pub struct Pending {
    answer: oneshot::Receiver<Answer>,
    deadline: Option<Instant>,
    _unanswered: Option<Counted>,
}

impl Pending {
    /// Waits for the answer, at most until the deadline.
    ///
    /// # Errors
    /// The deadline passed, or the predictor failed.
    pub async fn wait(self) -> Result<LengthEstimate, PredictError> {
        let answer = async { self.answer.await.unwrap_or(Err(PredictError::ShuttingDown)) };
        match self.deadline {
            None => answer.await,
            Some(deadline) => {
                let timed = tokio::time::timeout_at(deadline.into(), answer).await;
                timed.unwrap_or(Err(PredictError::DeadlineExceeded))
            }
        }
    }
}
