//! How a snapshotter is to behave: what the command line decides.

use std::time::Duration;

use crate::host_dirs::{ImageRule, Policy};
use crate::mount;
use crate::quota::ProjectRange;
#[cfg(doc)]
use crate::snapshotter::Snapshotter;
#[cfg(doc)]
use crate::types::LABEL_UPPERDIR;
use crate::types::Limits;
use crate::volume::Reserve;

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
        /// Whether a small layer stays as long as something stands on it, so that Docker's
        /// are not copied that are removed with their container.
        keeps_small: bool,
    },
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
    Off,
}

/// What the labels of pods may choose: those of snapshots in the namespace k8s.io.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodLabels {
    /// Nothing that is ours alone: they may be annotations of pods.
    Ignored,
    /// Everything: they are the administrator's.
    Trusted,
}

/// How snapshots are limited and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaOptions {
    pub mode: QuotaMode,
    /// Ids to give out. On one file system, each daemon has its own.
    pub ids: ProjectRange,
    /// Of each snapshot that is written to and not unpacked, where its labels do
    /// not say.
    pub default: Limits,
    /// How old a walk's figure may be when it is told again.
    pub usage_max_age: Duration,
}

/// How a [`Snapshotter`] is to behave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Options of every overlay mount that are configured, in order.
    pub mount_options: Vec<String>,
    /// Whether Remove deletes before it answers. Otherwise it moves to the trash,
    /// which Cleanup empties.
    pub removes_at_once: bool,
    pub sync: SyncMode,
    pub relocation: Relocation,
    /// What has to stay free on the writable volume.
    pub reserve: Reserve,
    /// Whether answers carry [`LABEL_UPPERDIR`].
    pub shows_upperdir: bool,
    pub quota: QuotaOptions,
    /// Which host directories may be shown to containers.
    pub lowers: Policy,
    /// Which are shown to the containers of some images, in order.
    pub lower_rules: Vec<ImageRule>,
    pub pod_labels: PodLabels,
}

impl Options {
    /// These options, with what this machine's kernel makes necessary.
    pub fn for_this_kernel(&self) -> Options {
        let mut options = self.clone();
        // The kernel lets nobody set a project there (ioctl_fssetxattr).
        if options.quota.mode == QuotaMode::Auto && mount::probe_user_namespace() {
            options.quota.mode = QuotaMode::Off;
        }
        options
    }

    /// All options of an overlay mount but those that name its directories, as the
    /// kernel needs them now. `spans_file_systems` if the directories are on several.
    pub fn overlay_options(&self, spans_file_systems: bool) -> Vec<String> {
        mount::overlay_options(&mount::Wanted {
            configured: &self.mount_options,
            allows_host_dirs: !self.lowers.allowed.is_empty(),
            spans_file_systems,
        })
    }
}
