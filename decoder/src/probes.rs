//! Lengths of requests that wait, predicted in the passes that decode: a prompt of the predictor's rides behind the running
//! rows, on the tokens and the cache blocks that they leave.
//!
//! Where the predictor's adapter begins within its prompt, what stands before is the request's own prompt, as the decoder
//! would compute it: the request waits for its probe and goes on with that part of its cache.

mod kept;

use std::collections::HashSet;

use lengthwise_core::RequestId;
use lengthwise_model::{Adapter, BlockTable, KvCache, Segment};

use kept::Kept;

/// Reads the lengths of answers off hidden states, which the continuous mode computes in the passes that decode.
pub trait Prober {
    /// Changes the network for the prompts of [`Prober::prompt`], and for nothing else in a pass.
    fn adapter(&self) -> &Adapter;

    /// The prompt whose last hidden state tells the length of the request's answer; `None` where it cannot be predicted.
    /// Asked once of a request, when its turn comes near.
    fn prompt(&self, id: &RequestId) -> Option<Vec<u32>>;

    /// The length, in tokens, that the request is scheduled by from now on; `None` where the hidden state tells none.
    ///
    /// - `hidden`: `[hidden]`, behind the network's last norm
    fn length(&self, id: &RequestId, hidden: &[f32]) -> Option<u32>;
}

/// Probes that are open at a time, and so in a pass: what a pass holds for each, its logits above all, is taken in advance.
pub(crate) const MOST_PROBES: usize = 64;

/// A predictor's prompt on its way through the passes. It draws no token.
#[derive(Debug)]
struct Probe {
    /// Which of the run's requests it is for.
    number: u32,
    tokens: Vec<u32>,
    /// The first of `tokens` that the prober's adapter changes.
    adapted_from: usize,
    /// How many of the first are the request's own as well, and come out of this probe as they would out of its prefill.
    shared: usize,
    /// How many of `tokens` have been through a pass.
    done: usize,
    /// How many go into the next pass.
    next: usize,
    table: BlockTable,
}

impl Probe {
    fn pending(&self) -> usize {
        self.tokens.len() - self.done
    }

    /// Its part of the next pass, and whether that is the last.
    fn segment(&self) -> (Segment<'_>, bool) {
        let segment = Segment {
            tokens: &self.tokens[self.done..self.done + self.next],
            start: self.done,
            table: &self.table,
            adapted_from: self.adapted_from.saturating_sub(self.done),
        };
        (segment, self.next == self.pending())
    }
}

/// A hidden state that a pass gave, and the number of the request that it tells of.
pub(crate) type Probed = (u32, Vec<f32>);

/// The probes of a run.
#[derive(Default)]
pub(crate) struct Probes<'a> {
    /// Who asks for them; without it there are none.
    pub prober: Option<&'a dyn Prober>,
    /// Those whose hidden state has not come yet, the first request's first.
    open: Vec<Probe>,
    /// What probes have left of requests that still wait.
    kept: Kept,
    /// Requests before this one have been looked at.
    looked_at: usize,
    /// Requests that were looked at and still wait.
    ahead: HashSet<u32>,
}

impl<'a> Probes<'a> {
    pub fn new(prober: Option<&'a dyn Prober>) -> Self {
        Self {
            prober,
            ..Self::default()
        }
    }

    /// Whether requests wait for their probes, since those do a part of their prefill: they are opened before anyone is
    /// admitted, and are a pass also where no row decodes.
    pub fn are_awaited(&self) -> bool {
        self.prober
            .is_some_and(|prober| !prober.adapter().config().invocation_tokens.is_empty())
    }

    /// Whether a request has to wait for its probe before it is admitted.
    pub fn holds(&self, number: u32) -> bool {
        self.open.iter().any(|probe| probe.number == number && probe.shared > 0)
    }

    /// The number of the next request that is to be looked at, as long as fewer than `slots` are predicted ahead.
    pub fn look(&mut self, slots: usize) -> Option<usize> {
        self.prober?;
        if self.ahead.len() >= slots || self.open.len() >= MOST_PROBES {
            return None;
        }
        self.looked_at += 1;
        Some(self.looked_at - 1)
    }

    /// Opens the probe of a request, of at most `most_tokens` tokens. A request that has a slot already is probed too: it
    /// may have been given more room than it needs.
    ///
    /// - `own`: the prompt of a request that waits
    pub fn open(&mut self, number: u32, id: &RequestId, own: Option<&[u32]>, most_tokens: usize) {
        let Some(prober) = self.prober else { return };
        let prompt = prober.prompt(id);
        let Some(tokens) = prompt.filter(|tokens| (1..=most_tokens).contains(&tokens.len())) else {
            return;
        };
        if own.is_some() {
            self.ahead.insert(number);
        }
        let adapted_from = prober.adapter().config().active_from(&tokens);
        self.open.push(Probe {
            number,
            adapted_from,
            shared: own.map_or(0, |own| shared(own, &tokens).min(adapted_from)),
            tokens,
            done: 0,
            next: 0,
            table: BlockTable::default(),
        });
    }

    /// The request waits no longer: it was given a slot. What its probe has left of its prompt in the cache, and how many
    /// tokens that are.
    pub fn admitted(&mut self, number: u32) -> Option<(BlockTable, usize)> {
        self.ahead.remove(&number);
        self.kept.take(number)
    }

    /// Nobody wants to know the request's length any more.
    pub fn drop(&mut self, number: u32, cache: &mut KvCache) {
        self.ahead.remove(&number);
        if let Some((table, _)) = self.kept.take(number) {
            cache.release(table);
        }
        if let Some(at) = self.open.iter().position(|probe| probe.number == number) {
            cache.release(self.open.remove(at).table);
        }
    }

    /// Nobody wants to know anything any more.
    pub fn drop_all(&mut self, cache: &mut KvCache) {
        self.open.drain(..).for_each(|probe| cache.release(probe.table));
        while self.kept.give_way(0, cache) {}
    }

    /// Takes the blocks of the last request that has any of a probe's; a probe that is open begins anew later. False where
    /// none does.
    pub fn give_way(&mut self, cache: &mut KvCache) -> bool {
        let last = self.open.iter().rposition(|probe| probe.table.capacity() > 0);
        if self.kept.give_way(last.map_or(0, |at| self.open[at].number), cache) {
            return true;
        }
        let Some(last) = last.map(|at| &mut self.open[at]) else {
            return false;
        };
        cache.release(std::mem::take(&mut last.table));
        last.done = 0;
        true
    }

    /// Shares `left` tokens of the next pass out, first come first. A probe gets the blocks for all its tokens before its
    /// first pass; where there are too few, those behind it give what their probes have left, or it waits, and so do those
    /// behind it.
    pub fn reserve(&mut self, cache: &mut KvCache, mut left: usize) {
        self.open.iter_mut().for_each(|probe| probe.next = 0);
        for probe in self.open.iter_mut().filter(|probe| probe.pending() > 0) {
            if left == 0 {
                return;
            }
            while !cache.reserve(&mut probe.table, probe.tokens.len()) {
                if !self.kept.give_way(probe.number, cache) {
                    return;
                }
            }
            probe.next = probe.pending().min(left);
            left -= probe.next;
        }
    }

    /// Of every probe in the next pass its segment, and whether it is the last of its prompt.
    pub fn segments(&self) -> impl Iterator<Item = (Segment<'_>, bool)> {
        self.open.iter().filter(|probe| probe.next > 0).map(Probe::segment)
    }

    /// After the pass was launched: frees the blocks of the prompts that ended in it, which no later pass reads, but those
    /// that the request goes on with. Returns the tokens that it took, and whose hidden states it will give.
    pub fn advance(&mut self, cache: &mut KvCache) -> (usize, Vec<u32>) {
        let (mut tokens, mut ended) = (0, Vec::new());
        for probe in self.open.iter_mut().filter(|probe| probe.next > 0) {
            tokens += probe.next;
            probe.done += std::mem::take(&mut probe.next);
            if probe.pending() == 0 {
                let mut table = std::mem::take(&mut probe.table);
                cache.shrink(&mut table, probe.shared);
                self.kept.keep(probe.number, table, probe.shared);
                ended.push(probe.number);
            }
        }
        (tokens, ended)
    }

    /// A hidden state has come. Whether anybody still wants to know.
    pub fn landed(&mut self, number: u32) -> bool {
        let at = self.open.iter().position(|probe| probe.number == number);
        at.map(|at| self.open.remove(at)).is_some()
    }
}

/// How many of the first tokens of a request's prompt a probe has as well; one is left to the request, which draws from it.
fn shared(own: &[u32], probe: &[u32]) -> usize {
    let alike = own.iter().zip(probe).take_while(|(a, b)| a == b).count();
    alike.min(own.len().saturating_sub(1))
}
