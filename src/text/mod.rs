//! Pure functions over text: containerd's filters, id mappings, sizes, metrics, URIs.

pub mod filter;
pub mod idmap;
pub mod prometheus;
pub(crate) mod size;
pub(crate) mod uri;
