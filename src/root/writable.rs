//! Takes the writable volume into use: marks it at the first start, recognises it at later
//! starts, and probes whether containers can write there.

use std::path::Path;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::mount;
use crate::store::Store;
use crate::types::Volume;
use crate::volume::{Claim, Holding, Identity, Lifetime, PROBE, Volumes};

/// A fact in the database: the identity of the writable volume. The database records it before
/// the volume's mark is written, so that a crash in between does not look like a disk that is
/// not mounted.
pub(super) const IDENTITY: &str = "writable_volume";
/// A fact in the database: the writable volume is known to carry its mark.
const CLAIMED: &str = "writable_volume_claimed";
/// A fact in the database: the [`circumstances`] of the last successful probe.
const PROBED: &str = "writable_volume_probed";

/// Makes the program expect the volume with the recorded identity in the writable directory.
/// Marks the directory if it was never marked. A volume that is missing at a later start is not
/// an error: the daemon then serves requests that do not need the volume.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if the directory was never marked, and it belongs to
/// another root or cannot hold overlayfs's upper directories.
pub fn set_up(
    volumes: &Volumes,
    store: &Store,
    lifetime: Lifetime,
    mount_options: &[String],
) -> Result<()> {
    let (identity, is_claimed) = match known(store)? {
        Some(known) => known,
        None => (Identity::random()?, false),
    };
    let begins_anew =
        is_claimed && lifetime == Lifetime::UntilReboot && is_emptied(volumes, &identity)?;
    if begins_anew {
        log::warn!(
            "the writable volume {} is empty, as is normal after a reboot with \
             --writable-volatile: containers start from their images again",
            volumes.writable_path()
        );
    }
    if !is_claimed || begins_anew {
        claim(volumes, store, &identity, mount_options)?;
        volumes.expect_writable(identity);
        return Ok(());
    }
    volumes.expect_writable(identity);
    // A missing volume is not reported here, because recovery logs it with the consequences.
    if volumes.open(Volume::Writable).is_ok() {
        probe_again(volumes, store, mount_options);
    }
    Ok(())
}

/// Returns an error if the file system of the image volume cannot hold layers. Checks this only
/// before the first snapshot is made: later, a file system that is full or read-only must not
/// keep the daemon from starting.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] saying what the file system cannot do.
pub fn require_layers(volumes: &Volumes, store: &Store, mount_options: &[String]) -> Result<()> {
    if !store.read()?.is_untouched()? {
        return Ok(());
    }
    // The probe works in the trash, so that files left by a crash are deleted with the trash.
    let image = volumes.image().dirs();
    image.trash_fd()?;
    let directory = format!("{}/trash", image.path());
    clear_probe(&directory)?;
    let probed = mount::probe_layers(&Path::new(&directory).join(PROBE), mount_options);
    let is_unsuitable =
        (probed.as_ref()).is_err_and(|error| error.kind() == ErrorKind::FailedPrecondition);
    let probed = probed.context(|| {
        let path = image.path();
        match is_unsuitable {
            true => format!(
                "the file system of {path} cannot hold image layers: use another one, for example \
                 ext4"
            ),
            false => format!("try on {path} whether image layers can be there"),
        }
    });
    probed.and(clear_probe(&directory))
}

/// Makes a directory that already holds snapshots the writable volume of the database. For the
/// command `import`, which then enters these snapshots into the database.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if the directory belongs to another root, or cannot hold
/// overlayfs's upper directories.
pub fn adopt(volumes: &Volumes, store: &Store, mount_options: &[String]) -> Result<()> {
    let identity = match known(store)? {
        Some((identity, _)) => identity,
        None => Identity::random()?,
    };
    if let Claim::Foreign(other) = volumes.look_at_writable(&identity)? {
        return Err(foreign(volumes.writable_path(), &other));
    }
    record(store, &identity)?;
    mark(volumes, store, &identity, mount_options)?;
    volumes.expect_writable(identity);
    Ok(())
}

/// Names everything that the result of a probe depends on: the kernel, the file system and the
/// mount options. After a change of one of them, the volume is probed again.
fn circumstances(volumes: &Volumes, mount_options: &[String]) -> Result<String> {
    Ok(format!(
        "{} {} {}",
        mount::kernel_release(),
        volumes.writable_file_system()?,
        mount_options.join(",")
    ))
}

/// Probes the writable volume again if the [`circumstances`] have changed. Only logs a failure:
/// a volume that is full or read-only must not keep the daemon from starting.
fn probe_again(volumes: &Volumes, store: &Store, mount_options: &[String]) {
    let probed = || {
        let now = circumstances(volumes, mount_options)?;
        if store.read()?.fact(PROBED)?.as_deref() == Some(&*now) {
            return Ok(());
        }
        probe(volumes, mount_options)?;
        let mut transaction = store.write()?;
        transaction.record_fact(PROBED, &now)?;
        transaction.commit()
    };
    if let Err(error) = probed() {
        log::warn!(
            "the writable volume {} has failed a probe, so containers may fail to start: {}",
            volumes.writable_path(),
            error.chain()
        );
    }
}

/// Makes the program expect the writable volume that the database has recorded, if there is
/// one.
pub fn expect_recorded(volumes: &Volumes, store: &Store) -> Result<()> {
    if let Some((identity, _)) = known(store)? {
        volumes.expect_writable(identity);
    }
    Ok(())
}

/// Which writable volume the database knows, and whether the volume is known to carry
/// its mark; `None` if the database knows none.
///
/// # Errors
///
/// [`ErrorKind::DataLoss`] if the recorded text is not an identity.
pub fn known(store: &Store) -> Result<Option<(Identity, bool)>> {
    let rows = store.read()?;
    let is_claimed = rows.fact(CLAIMED)?.is_some();
    let Some(text) = rows.fact(IDENTITY)? else {
        return Ok(None);
    };
    let identity = Identity::parse(&text).ok_or_else(|| {
        let what =
            format!("the database is damaged: its identity of the writable volume is {text:?}");
        Error::data_loss(what)
    })?;
    Ok(Some((identity, is_claimed)))
}

/// Gives up a writable volume that is lost: records a new identity in the database, with which
/// [`set_up`] then marks the writable directory. The directory is examined first, so that a
/// refusal changes nothing.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if the volume is not lost, or if the directory is another
/// root's volume, holds snapshots or cannot hold upper directories.
pub fn give_up(volumes: &Volumes, store: &Store, mount_options: &[String]) -> Result<()> {
    let path = volumes.writable_path();
    match volumes.open(Volume::Writable) {
        Ok(_) => {
            return Err(Error::refused(format!(
                "the writable volume is at {path}, where it belongs: there is nothing to reset"
            )));
        }
        Err(error) if error.kind() == ErrorKind::FailedPrecondition => {}
        // Any other error may come from a failed disk, whose volume is not missing.
        Err(error) => return Err(error),
    }
    volumes.require_writable_mounted()?;
    let identity = Identity::random()?;
    require_free(volumes, &identity)?;
    probe(volumes, mount_options)?;
    let mut transaction = store.write()?;
    transaction.forget_fact(CLAIMED)?;
    transaction.record_fact(IDENTITY, &identity.to_string())?;
    transaction.commit()
}

/// Returns an error if the writable directory is marked as another volume, or has entries in
/// `snapshots` or `trash`, which would be taken for strays.
fn require_free(volumes: &Volumes, identity: &Identity) -> Result<()> {
    let path = volumes.writable_path();
    match volumes.look_at_writable(identity)? {
        Claim::Foreign(other) => Err(foreign(path, &other)),
        Claim::Free if volumes.writable_holding()? == Holding::OurNames => {
            Err(Error::refused(format!(
                "the writable directory {path} has no mark, but there are files in \
                 {path}/snapshots or {path}/trash: give another --writable-dir, or move these \
                 files away"
            )))
        }
        Claim::Ours | Claim::Free => Ok(()),
    }
}

fn foreign(path: &str, other: &Identity) -> Error {
    Error::refused(format!(
        "the writable directory {path} is the volume {other} of another root: give another \
         --writable-dir, or, if no other snapshotter uses {path}, empty it and remove \
         {path}/.volume"
    ))
}

/// Whether the writable directory is a mount point without any entries, as after a reboot.
fn is_emptied(volumes: &Volumes, identity: &Identity) -> Result<bool> {
    // `look_at_writable` creates the directory, so it must not come first.
    Ok(volumes.is_writable_mounted_anew()?
        && volumes.look_at_writable(identity)? == Claim::Free
        && volumes.writable_holding()? == Holding::Nothing)
}

fn claim(
    volumes: &Volumes,
    store: &Store,
    identity: &Identity,
    mount_options: &[String],
) -> Result<()> {
    volumes.require_writable_mounted()?;
    require_free(volumes, identity)?;
    record(store, identity)?;
    mark(volumes, store, identity, mount_options)
}

/// Probes the writable directory before marking it: a directory that is not suitable stays as
/// it was, and the next start can use another one.
fn mark(
    volumes: &Volumes,
    store: &Store,
    identity: &Identity,
    mount_options: &[String],
) -> Result<()> {
    probe(volumes, mount_options)?;
    volumes.claim_writable(identity)?;
    let mut transaction = store.write()?;
    transaction.record_fact(CLAIMED, "yes")?;
    transaction.forget_block(Volume::Writable)?;
    let circumstances = circumstances(volumes, mount_options)?;
    transaction.record_fact(PROBED, &circumstances)?;
    transaction.commit()
}

/// Records the identity of the volume that is about to be marked. Callers check the directory
/// before: the database must not name a volume that was never marked.
fn record(store: &Store, identity: &Identity) -> Result<()> {
    let mut transaction = store.write()?;
    transaction.record_fact(IDENTITY, &identity.to_string())?;
    transaction.commit()
}

/// Probes whether the writable volume can hold overlayfs's upper directories. Uses a directory
/// of its own, which the next start removes if a crash leaves it.
fn probe(volumes: &Volumes, mount_options: &[String]) -> Result<()> {
    let scratch = Path::new(volumes.writable_path()).join(PROBE);
    clear_probe(volumes.writable_path())?;
    let probed = mount::probe_upper(&scratch, mount_options);
    let is_unsuitable =
        (probed.as_ref()).is_err_and(|error| error.kind() == ErrorKind::FailedPrecondition);
    let probed = probed.context(|| {
        let path = volumes.writable_path();
        match is_unsuitable {
            true => format!(
                "the file system of {path} cannot hold what containers write (overlayfs's upper \
                 directory): use another one, for example ext4"
            ),
            false => format!("try on {path} whether containers can write there"),
        }
    });
    // The probe's directory is removed even after a failure, so that a refused directory stays
    // as it was.
    probed.and(clear_probe(volumes.writable_path()))
}

/// Removes the files that an interrupted probe has left in the writable directory.
pub fn clear_probe(writable: &str) -> Result<()> {
    let scratch = Path::new(writable).join(PROBE);
    mount::unmount_stale(&scratch.join(mount::MERGED));
    match std::fs::remove_dir_all(&scratch) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.context(|| format!("remove {}", scratch.display())),
    }
}
