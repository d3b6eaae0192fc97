//! Parts of prompts that probes have left in the cache, for the requests that they are of.

use std::collections::BTreeMap;

use lengthwise_model::{BlockTable, KvCache};

/// By request the blocks of its first tokens, and how many those are. They wait for its slot.
#[derive(Debug, Default)]
pub(super) struct Kept(BTreeMap<u32, (BlockTable, usize)>);

impl Kept {
    /// Keeps the first `tokens` tokens of a request, if that is any.
    pub fn keep(&mut self, number: u32, table: BlockTable, tokens: usize) {
        if tokens > 0 {
            self.0.insert(number, (table, tokens));
        }
    }

    pub fn take(&mut self, number: u32) -> Option<(BlockTable, usize)> {
        self.0.remove(&number)
    }

    /// Frees the blocks of the last request behind `number`, or of that itself. False where none has any.
    pub fn give_way(&mut self, number: u32, cache: &mut KvCache) -> bool {
        let last = self.0.last_entry().filter(|last| *last.key() >= number);
        last.map(|last| cache.release(last.remove().0)).is_some()
    }
}
