//! Launches that are recorded once and replayed as CUDA graphs.

use std::collections::{HashMap, HashSet};

use candle_core::cuda_backend::cudarc::driver::{CudaGraph, sys};
use candle_core::{Error, Result, bail};

use super::CudaGpu;
use crate::without_backtrace;

/// Graphs that are kept; most passes have one of a few batch sizes.
const MOST_GRAPHS: usize = 64;

/// Set, it lets every pass be launched kernel by kernel.
const VARIABLE: &str = "LENGTHWISE_NO_GRAPHS";

/// What was recorded on a stream.
pub(super) struct Graphs {
    kept: HashMap<u64, Graph>,
    /// Keys that were launched once: the next time they are recorded.
    warm: HashSet<u64>,
    /// A recording failed, or none is wanted.
    unrecordable: bool,
}

impl Graphs {
    pub fn new() -> Self {
        Self {
            kept: HashMap::new(),
            warm: HashSet::new(),
            unrecordable: std::env::var_os(VARIABLE).is_some(),
        }
    }
}

/// A recorded pass.
struct Graph(CudaGraph);

// SAFETY: a graph may be used from any thread, one at a time; it lies in a `RefCell`, which is not `Sync`.
unsafe impl Send for Graph {}

impl Graph {
    fn launch(&self) -> Result<()> {
        self.0.launch().map_err(Error::wrap)
    }
}

impl CudaGpu {
    pub fn replay(&self, key: u64, launches: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.bind()?;
        if let Some(graph) = self.graphs.borrow().kept.get(&key) {
            return graph.launch();
        }
        // The first time runs as it is: it loads the kernels and lets cuBLAS choose its own.
        if self.graphs.borrow_mut().warm.insert(key) {
            return launches();
        }
        self.make_room();
        let Some(graph) = self.try_to_record(launches) else {
            return launches();
        };
        if let Err(err) = graph.launch() {
            self.record_no_more(err);
            return launches();
        }
        self.graphs.borrow_mut().kept.insert(key, graph);
        Ok(())
    }

    /// A recording, or `None` where this GPU's driver makes none, with early launches or without.
    fn try_to_record(&self, launches: &mut dyn FnMut() -> Result<()>) -> Option<Graph> {
        if self.graphs.borrow().unrecordable {
            return None;
        }
        let failed = match self.record(launches) {
            Ok(graph) => return Some(graph),
            Err(failed) => failed,
        };
        if self.launches_early.replace(false) {
            if let Ok(graph) = self.record(launches) {
                let failed = without_backtrace(failed);
                tracing::warn!("kernels that begin early cannot be recorded on this GPU, so none does: {failed}");
                return Some(graph);
            }
            self.launches_early.set(true);
        }
        self.record_no_more(failed);
        None
    }

    fn record_no_more(&self, err: Error) {
        let err = without_backtrace(err);
        tracing::warn!("passes cannot be recorded on this GPU, so each is launched kernel by kernel: {err}");
        self.graphs.borrow_mut().unrecordable = true;
    }

    /// Drops all graphs where there are too many: of buffers or adapters that are gone, mostly.
    fn make_room(&self) {
        if self.graphs.borrow().kept.len() >= MOST_GRAPHS {
            // One may be running.
            let _ = self.stream.synchronize();
            self.graphs.borrow_mut().kept.clear();
        }
    }

    fn record(&self, launches: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(Error::wrap)?;
        let launched = launches();
        // An error that cudarc keeps from somewhere else would let it end without ending the recording.
        let earlier = self.stream.context().check_err().map_err(Error::wrap);
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream.end_capture(flags).map_err(Error::wrap);
        launched.and(earlier)?;
        match graph? {
            Some(graph) => Ok(Graph(graph)),
            None => bail!("the recorded pass is empty"),
        }
    }

    /// As a graph, where they can be recorded: so steps run, and the host's part of a launch does not count.
    pub fn time(&self, times: usize, launches: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.bind()?;
        // Loads the kernels and lets cuBLAS choose its own.
        launches()?;
        let graph = self.try_to_record(launches);
        let event = || {
            let timed = sys::CUevent_flags::CU_EVENT_DEFAULT;
            self.stream.record_event(Some(timed)).map_err(Error::wrap)
        };
        let mut best = f64::INFINITY;
        for _ in 0..times {
            let began = event()?;
            match &graph {
                Some(graph) => graph.launch()?,
                None => launches()?,
            }
            // It waits for both.
            let milliseconds = began.elapsed_ms(&event()?).map_err(Error::wrap)?;
            best = best.min(f64::from(milliseconds) / 1e3);
        }
        Ok(best)
    }
}
