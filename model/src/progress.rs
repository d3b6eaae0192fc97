//! How far the opening of a model is.

/// Is told how far the opening of a model is; `()` does not care.
pub trait OpenProgress {
    /// `done_bytes` of `total_bytes` of `file` are here. The first call says what an earlier run had left.
    fn downloaded(&mut self, file: &str, done_bytes: u64, total_bytes: u64);

    /// `done` of `total` parts of the network, its layers mostly, are in memory.
    fn loaded(&mut self, done: usize, total: usize);
}

impl OpenProgress for () {
    fn downloaded(&mut self, _file: &str, _done_bytes: u64, _total_bytes: u64) {}

    fn loaded(&mut self, _done: usize, _total: usize) {}
}
