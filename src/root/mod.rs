//! The root directory before the daemon serves: the lock, the record of which
//! database belongs to the root, and the claim to the writable volume.

pub(crate) mod lock;
pub(crate) mod open;
pub(crate) mod state;
pub(crate) mod writable;
