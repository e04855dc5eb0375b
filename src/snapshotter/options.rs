//! How a snapshotter is to behave: what the command line decides.

use std::time::Duration;

use crate::host_dirs::{ImageRule, Policy};
use crate::quota::ProjectRange;
#[cfg(doc)]
use crate::snapshotter::Snapshotter;
#[cfg(doc)]
use crate::types::LABEL_UPPERDIR;
use crate::types::Limits;
use crate::volume::Reserve;

/// When deleted bytes are given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemovalMode {
    /// By Cleanup; Remove only moves to the trash.
    OnCleanup,
    /// Before Remove answers.
    AtOnce,
}

/// When a layer's data is made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// Before its Commit is answered.
    AtCommit,
    /// When the kernel sees fit.
    Never,
}

/// What becomes of layers that were committed on the writable volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relocation {
    /// They move to the image volume, that long after their commit or later.
    Background {
        /// How long most layers of a build or of Docker's are kept.
        after: Duration,
    },
    /// They stay.
    Never,
}

/// Whether snapshots on the writable volume get projects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuotaMode {
    /// Where its file system can; one that should be limited is refused where it
    /// cannot.
    Auto,
    /// Always: without, nothing is written there.
    Require,
    /// Never.
    Off,
}

/// How snapshots are limited and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaOptions {
    /// See [`QuotaMode`].
    pub mode: QuotaMode,
    /// Ids to give out. On one file system, each daemon has its own.
    pub ids: ProjectRange,
    /// Of each snapshot that is written to and not unpacked, where its labels do
    /// not say.
    pub default: Limits,
    /// How old a walk's figure may be when it is told again.
    pub usage_max_age: Duration,
}

/// Whether answers carry [`LABEL_UPPERDIR`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpperdirLabel {
    /// They do.
    Shown,
    /// They do not.
    Hidden,
}

/// How a [`Snapshotter`] is to behave.
#[derive(Clone, Debug)]
pub struct Options {
    /// Options of every overlay mount, in order.
    pub mount_options: Vec<String>,
    /// See [`RemovalMode`].
    pub removal: RemovalMode,
    /// See [`SyncMode`].
    pub sync: SyncMode,
    /// See [`Relocation`].
    pub relocation: Relocation,
    /// What has to stay free on the writable volume.
    pub reserve: Reserve,
    /// See [`UpperdirLabel`].
    pub upperdir_label: UpperdirLabel,
    /// See [`QuotaOptions`].
    pub quota: QuotaOptions,
    /// Which host directories may be shown to containers.
    pub lowers: Policy,
    /// Which are shown to the containers of some images, in order.
    pub lower_rules: Vec<ImageRule>,
}
