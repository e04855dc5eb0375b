//! What the program does beside serving: one module for each command.

pub mod check;
pub mod doctor;
pub mod import;
pub mod mount;
mod output;
pub mod status;
