//! A containerd proxy snapshotter that keeps image layers on one disk and what
//! containers write on another.
//!
//! The way of a request, each module calling only those after it:
//! `main → daemon → service → snapshotter → { store, volume, overlay, mount, quota, tree, lowers }`;
//! the commands `check`, `status`, `doctor`, `import` and `rescue` take the place of the service;
//! `types`, `error`, `lock`, `background`, `fault`, `mountinfo`, `plain` and `fnv` are free to all,
//! `filter` and `idmap` are pure leaves, and so is `bolt` but for reading its one file.

mod background;
pub mod bolt;
pub mod check;
pub mod config;
pub mod daemon;
pub mod doctor;
pub mod error;
mod fault;
pub mod filter;
mod fnv;
pub mod idmap;
pub mod import;
mod lock;
pub mod lowers;
pub mod mount;
pub mod mountinfo;
pub mod overlay;
mod plain;
pub mod prometheus;
pub mod quota;
pub mod rescue;
pub mod service;
mod size;
pub mod snapshotter;
pub mod status;
pub mod store;
mod sys;
pub mod tree;
pub mod types;
pub mod volume;

/// The messages of containerd's API, generated from `proto/` by `build.rs`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}
