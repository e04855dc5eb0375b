//! What the program does beside serving: one module for each command.

pub mod check;
pub mod doctor;
pub mod import;
mod losses;
pub mod mount;
pub mod output;
pub mod status;
