//! Which samples of a collection are there, and which are still wanted.

use std::collections::{BTreeSet, HashMap};

use lengthwise_core::{DecodeError, Refusal, Request, RequestId, Response, SamplingParams};

use crate::files::{FileError, Journal, LengthRecord, Sample};

use super::{CollectError, CollectJob, CollectProgress, CollectSummary};

/// One sample that is wanted: of which instruction, and which of its samples.
struct Wanted {
    instruction: usize,
    sample: usize,
}

/// A collection under way.
pub(super) struct Collection<'a> {
    job: CollectJob<'a>,
    /// Temperature and number of every sample of an instruction.
    samples: Vec<(f32, usize)>,
    journal: Journal,
    /// By place in the input: complete records.
    records: Vec<Option<LengthRecord>>,
    /// By place in the input: samples so far of those that are not complete.
    open: HashMap<usize, Vec<Option<Sample>>>,
    /// By request: what its response is. A request's id is never taken apart.
    wanted: HashMap<RequestId, Wanted>,
    too_long: BTreeSet<usize>,
    refused: BTreeSet<usize>,
    resumed: usize,
    done: usize,
    tokens: u64,
}

impl<'a> Collection<'a> {
    /// Begins a collection or goes on with one.
    pub fn open(job: CollectJob<'a>) -> Result<Self, CollectError> {
        let samples = job.config.samples()?;
        let settings = serde_json::to_string(job.config).expect("plain data is serialisable");
        let (journal, lines) = Journal::open(job.output, &settings)?;
        let records = finished(&job, &lines)?;
        let resumed = records.iter().flatten().count();
        Ok(Self {
            job,
            samples,
            journal,
            records,
            open: HashMap::new(),
            wanted: HashMap::new(),
            too_long: BTreeSet::new(),
            refused: BTreeSet::new(),
            resumed,
            done: resumed,
            tokens: 0,
        })
    }

    /// A request for every sample that is still missing, in the order of the input.
    pub fn requests(&mut self) -> Vec<Request> {
        self.wanted.clear();
        let mut requests = Vec::new();
        for instruction in 0..self.records.len() {
            if self.records[instruction].is_some() || self.is_left_out(instruction) {
                continue;
            }
            let samples = self.samples.len();
            let open = self.open.entry(instruction).or_insert_with(|| vec![None; samples]);
            let missing: Vec<usize> = (0..samples).filter(|&sample| open[sample].is_none()).collect();
            for sample in missing {
                let request = self.request(instruction, sample);
                self.wanted.insert(request.id.clone(), Wanted { instruction, sample });
                requests.push(request);
            }
        }
        requests
    }

    fn request(&self, instruction: usize, sample: usize) -> Request {
        let (source, config) = (&self.job.instructions[instruction], self.job.config);
        let (temperature, k) = self.samples[sample];
        let parts = [
            &config.seed.to_string(),
            source.id.as_str(),
            &format!("{temperature}/{k}"),
        ];
        Request {
            id: format!("{}#t{temperature}#{k}", source.id).into(),
            prompt: source.prompt.clone(),
            max_new_tokens: config.max_new_tokens,
            sampling: SamplingParams {
                temperature,
                seed: stable_hash(&parts),
                top_p: config.top_p,
                top_k: config.top_k,
            },
        }
    }

    /// Keeps a response; true where it completed its instruction.
    pub fn add(&mut self, response: Response) -> Result<bool, FileError> {
        let Some(Wanted { instruction, sample }) = self.wanted.remove(&response.id) else {
            tracing::warn!("a response came for {}, which was not asked for", response.id);
            return Ok(false);
        };
        let Some(samples) = self.open.get_mut(&instruction) else {
            return Ok(false);
        };
        self.tokens += u64::from(response.tokens);
        samples[sample] = Some(Sample {
            temperature: self.samples[sample].0,
            tokens: response.tokens,
            finish: response.finish,
            text: self.job.config.save_text.then_some(response.text),
        });
        if samples.iter().any(Option::is_none) {
            return Ok(false);
        }
        let samples = self.open.remove(&instruction).into_iter().flatten().flatten().collect();
        let source = &self.job.instructions[instruction];
        let record = LengthRecord {
            id: source.id.clone(),
            instruction: Some(source.instruction().to_owned()),
            messages: source.conversation().to_vec(),
            samples,
        };
        self.journal.push(&line(&record))?;
        self.records[instruction] = Some(record);
        self.done += 1;
        Ok(true)
    }

    /// The prompt of a request does not fit: its instruction is left out, or the collection ends.
    pub fn too_long(&mut self, request: RequestId, got: usize, max: usize) -> Result<(), CollectError> {
        let Some(&Wanted { instruction, .. }) = self.wanted.get(&request) else {
            return Err(DecodeError::PromptTooLong { id: request, got, max }.into());
        };
        let id = self.job.instructions[instruction].id.clone();
        if !self.job.skip_too_long {
            return Err(CollectError::TooLong { id, got, max });
        }
        tracing::warn!("instruction {id} is left out: its prompt has {got} tokens, the model takes at most {max}");
        self.too_long.insert(instruction);
        self.open.remove(&instruction);
        Ok(())
    }

    /// The server will not run requests: their instructions are left out, as long as there are others.
    pub fn refused(&mut self, refusals: Vec<Refusal>) -> Result<(), CollectError> {
        for Refusal { id, reason } in refusals {
            let Some(&Wanted { instruction, .. }) = self.wanted.get(&id) else {
                continue;
            };
            let id = self.job.instructions[instruction].id.clone();
            if self.refused.insert(instruction) {
                tracing::warn!("instruction {id} is left out: {reason}");
                self.open.remove(&instruction);
            }
            if self.refused.len() == self.records.len() {
                return Err(CollectError::AllRefused { id, reason });
            }
        }
        Ok(())
    }

    /// The instruction that a request samples.
    pub fn instruction_of(&self, request: RequestId) -> RequestId {
        match self.wanted.get(&request) {
            Some(wanted) => self.job.instructions[wanted.instruction].id.clone(),
            None => request,
        }
    }

    fn is_left_out(&self, instruction: usize) -> bool {
        self.too_long.contains(&instruction) || self.refused.contains(&instruction)
    }

    pub fn progress(&self) -> CollectProgress {
        CollectProgress {
            done: self.done,
            total: self.records.len(),
            tokens: self.tokens,
        }
    }

    /// Writes the output, if nothing is missing.
    pub fn finish(self) -> Result<CollectSummary, CollectError> {
        let id = |place: usize| self.job.instructions[place].id.clone();
        let missing = |place: &usize| self.records[*place].is_none() && !self.is_left_out(*place);
        if let Some(place) = (0..self.records.len()).find(missing) {
            return Err(CollectError::Unanswered {
                id: id(place),
                got: self
                    .open
                    .get(&place)
                    .map_or(0, |samples| samples.iter().flatten().count()),
                wanted: self.samples.len(),
            });
        }
        let ids = |places: &BTreeSet<usize>| places.iter().map(|&place| id(place)).collect();
        let (too_long, refused): (Vec<_>, Vec<_>) = (ids(&self.too_long), ids(&self.refused));
        if !self.records.is_empty() && self.records.iter().all(Option::is_none) {
            let (too_long, refused) = (too_long.len(), refused.len());
            return Err(CollectError::NothingLeft { too_long, refused });
        }
        let records: Vec<LengthRecord> = self.records.into_iter().flatten().collect();
        let text: String = records.iter().map(|r| line(r) + "\n").collect();
        self.journal.finish(&text)?;
        Ok(CollectSummary {
            records,
            resumed: self.resumed,
            too_long,
            refused,
            tokens: self.tokens,
        })
    }
}

/// What an earlier run finished, by place in the input.
fn finished(job: &CollectJob, lines: &[String]) -> Result<Vec<Option<LengthRecord>>, CollectError> {
    let journal = || job.output.display().to_string();
    let places: HashMap<&RequestId, usize> = job.instructions.iter().enumerate().map(|(i, r)| (&r.id, i)).collect();
    let mut records = vec![None; job.instructions.len()];
    for (index, line) in lines.iter().enumerate() {
        // The first line of the journal is its settings.
        let damaged = |_| CollectError::Damaged {
            journal: journal(),
            line: index + 2,
        };
        let record: LengthRecord = serde_json::from_str(line).map_err(damaged)?;
        let same = |place: &usize| {
            let source = &job.instructions[*place];
            record.instruction.as_deref() == Some(source.instruction()) && record.messages == source.conversation()
        };
        let Some(place) = places.get(&record.id).copied().filter(same) else {
            return Err(CollectError::OtherInput {
                journal: journal(),
                id: record.id,
            });
        };
        records[place] = Some(record);
    }
    Ok(records)
}

fn line(record: &LengthRecord) -> String {
    serde_json::to_string(record).expect("plain data is serialisable")
}

/// FNV-1a over the parts: the same on every machine and in every version, as a sample's seed must be.
fn stable_hash(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::stable_hash;

    #[test]
    fn seeds_stay_what_they_are() {
        // FNV-1a of "a" and 0xff, by its definition.
        let want =
            ((0xcbf2_9ce4_8422_2325u64 ^ 0x61).wrapping_mul(0x0100_0000_01b3) ^ 0xff).wrapping_mul(0x0100_0000_01b3);
        assert_eq!(stable_hash(&["a"]), want);
        // The parts are told apart.
        assert_ne!(stable_hash(&["1", "23"]), stable_hash(&["12", "3"]));
    }
}
