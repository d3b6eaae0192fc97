//! What is counted of every prediction asked for over gRPC.

use std::time::Instant;

use tonic::Code;

/// Says of every metric what it counts.
pub(crate) fn describe() {
    use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
    describe_counter!(
        "lengthwise_predict_requests_total",
        "Predictions asked for, by the gRPC code of the answer"
    );
    describe_counter!(
        "lengthwise_predict_fallback_total",
        "Predictions for which the fallback stood in, since the model's answer was no number"
    );
    describe_gauge!("lengthwise_queue_depth", "Requests that wait for the model");
    describe_histogram!(
        "lengthwise_predict_duration_seconds",
        Unit::Seconds,
        "Time from a request's arrival to its answer"
    );
    describe_histogram!("lengthwise_predict_batch_size", "Requests predicted together");
}

/// Predictions of one call, from its arrival. Counted when it is dropped, as `Cancelled` where the caller went away.
pub(crate) struct Measured {
    began: Instant,
    requests: usize,
    code: Code,
}

impl Measured {
    pub fn begin(requests: usize) -> Self {
        Self {
            began: Instant::now(),
            requests,
            code: Code::Cancelled,
        }
    }

    pub fn end(mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for Measured {
    fn drop(&mut self) {
        let seconds = metrics::histogram!("lengthwise_predict_duration_seconds");
        seconds.record_many(self.began.elapsed(), self.requests);
        let requests = metrics::counter!("lengthwise_predict_requests_total", "code" => name(self.code));
        requests.increment(self.requests as u64);
    }
}

/// The code as gRPC spells it.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        _ => "UNKNOWN",
    }
}
