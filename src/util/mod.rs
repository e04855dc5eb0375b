//! Helpers that belong to no domain.

pub(crate) mod cached_lookup;
pub(crate) mod descriptors;
pub(crate) mod entries;
pub(crate) mod fault_point;
pub(crate) mod fnv;
pub(crate) mod lock;
pub(crate) mod monitor;
pub(crate) mod patience;
pub(crate) mod sha256;
pub(crate) mod threads;
pub(crate) mod undo;
