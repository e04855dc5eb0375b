//! What is checked in the root directory before the daemon serves: the lock, which database
//! belongs to the root, and which disk is the writable volume.

pub(crate) mod lock;
pub(crate) mod open;
pub(crate) mod state;
pub(crate) mod writable;
