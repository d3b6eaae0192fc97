//! A hash that is the same in every process, to be kept in files.

use std::hash::{DefaultHasher, Hash, Hasher};

/// SipHash-1-3 with fixed keys. Unfinished work and finished adapters are known again by it.
pub fn fixed_hash(value: &(impl Hash + ?Sized)) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::fixed_hash;

    #[test]
    fn what_earlier_versions_wrote_stays_valid() {
        // The standard library may change its hasher: then it has to be written out here.
        assert_eq!(fixed_hash("a"), 0x719b_50b9_a4f0_e9f3);
        assert_eq!(fixed_hash(&(7u64, 1usize, 2usize)), 0xddbd_aa13_5600_06cd);
    }
}
