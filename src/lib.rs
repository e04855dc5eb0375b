//! A containerd proxy snapshotter that keeps image layers on one disk and what
//! containers write on another.
//!
//! A request passes through these modules, each of which calls only those after it: `main →
//! daemon → service → snapshotter → { store, volume, host_dirs, mount, quota, tree }`. The
//! commands call the modules after the service directly. `containerd` is a client of
//! containerd, for commands. `root` opens the root directory for the daemon and for commands.
//! `waits` counts what requests wait for. `types`, `error`, `sys` and `util` may be used by
//! every module, and `text` has pure functions only.

pub mod commands;
pub mod config;
pub mod containerd;
pub mod daemon;
pub mod error;
mod host_dirs;
pub mod mount;
pub mod quota;
mod root;
mod service;
mod snapshotter;
mod store;
mod sys;
pub mod text;
pub mod tree;
pub mod types;
mod util;
mod volume;
mod waits;

/// The messages of containerd's API, generated from `proto/` by `build.rs`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}
