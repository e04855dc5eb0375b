//! The commands of the program, one module for each.

pub mod check;
pub mod configuration;
pub mod doctor;
pub mod import;
mod losses;
pub mod mount;
pub mod output;
mod progress;
pub mod status;

/// The argument and the function of the child process that finds out whether the disk of the
/// writable volume answers.
pub use crate::root::open::ASK_CHILD;
pub use crate::volume::ask_for_mark;
