//! What a request costs while it waits: its text, its settings and little else. A binary of its own, since it counts every
//! allocation of the process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::Device;
use lengthwise_core::SamplingParams;
use lengthwise_decoder::{Engine, EngineConfig, KvBudget, PredictedRequest, SequenceRequest, run_strategy};
use lengthwise_model::{DTypeChoice, LoadedModel, TINY};
use lengthwise_scheduler::{ScheduleConfig, Strategy};

/// Bytes that are allocated, and the most that were.
static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: the system's allocator does the work, and counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        MOST.fetch_max(held, Ordering::SeqCst);
        // SAFETY: the caller's layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: it came from `alloc` with this layout.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes that a run of so many requests holds at a time beyond what it was handed.
fn most_held(engine: &mut Engine, requests: u32) -> anyhow::Result<usize> {
    let request = |i: u32| PredictedRequest {
        request: SequenceRequest {
            id: i.to_string().into(),
            prompt: vec![5; 4],
            max_new_tokens: 1,
            sampling: SamplingParams::GREEDY,
            replay_tokens: Some(1),
        },
        // In no order, as predictions come.
        predicted: 1 + i * 7919 % 512,
    };
    let config = ScheduleConfig {
        batch_size: NonZeroUsize::new(64).expect("not 0"),
        ..ScheduleConfig::new(Strategy::Continuous)
    };
    let requests: Vec<PredictedRequest> = (0..requests).map(request).collect();
    let before = HELD.load(Ordering::SeqCst);
    MOST.store(before, Ordering::SeqCst);
    run_strategy(engine, requests, &config, &mut |_| Ok(()))?;
    Ok(MOST.load(Ordering::SeqCst) - before)
}

#[test]
fn a_waiting_request_takes_at_most_200_bytes_beyond_its_text() -> anyhow::Result<()> {
    let model = LoadedModel::open(TINY, DTypeChoice::Auto, &Device::Cpu, &mut ())?;
    let config = EngineConfig {
        kv_budget: KvBudget::Tokens(64 * 16),
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(Arc::clone(&model.network), None, Vec::new(), config)?;
    // The engine's own buffers are there from the first run on. The difference of two sizes has no constant part.
    let few = most_held(&mut engine, 8_000)?;
    let few = most_held(&mut engine, 8_000)?.min(few);
    let many = most_held(&mut engine, 16_000)?;
    let each = (many - few).div_ceil(8_000) + size_of::<PredictedRequest>();
    assert!((size_of::<PredictedRequest>()..=200).contains(&each), "{each} bytes");
    Ok(())
}
