//! Pure functions over text: containerd's filters, id mappings, sizes, metrics.

pub mod filter;
pub mod idmap;
pub mod prometheus;
pub(crate) mod size;
