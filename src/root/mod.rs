//! What stands in the root directory before anyone serves: the lock, the record of
//! which database belongs to it, and the claim to the writable volume.

pub(crate) mod lock;
pub(crate) mod open;
pub(crate) mod state;
pub(crate) mod writable;
