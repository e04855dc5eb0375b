//! Taking the writable volume into use: it is marked at the first start, recognised
//! at later ones, and probed whether containers can write there.

use std::path::Path;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::mount;
use crate::store::Store;
use crate::types::Volume;
use crate::volume::{Claim, Holding, Identity, Lifetime, PROBE, Volumes};

/// Facts in the database: the volume's identity, and whether its mark is known
/// to be on the disk. The first is recorded before the mark is written, so
/// that a crash in between does not look like a disk that is not mounted.
pub(super) const IDENTITY: &str = "writable_volume";
const CLAIMED: &str = "writable_volume_claimed";
/// The circumstances in which the volume could hold overlayfs's upper directories.
const PROBED: &str = "writable_volume_probed";

/// Binds the writable directory to the identity in the database, and marks it if that was
/// not done yet. If the volume is missing at a later start, that is no error: the daemon
/// serves requests that do not need it.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if at the first start the directory belongs to
/// another root, or if it cannot hold overlayfs's upper directories.
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
            "the writable volume {} is empty, as after a reboot: containers start from their \
             images",
            volumes.writable_path()
        );
    }
    if !is_claimed || begins_anew {
        claim(volumes, store, &identity, mount_options)?;
        volumes.expect_writable(identity);
        return Ok(());
    }
    volumes.expect_writable(identity);
    // If the volume is missing, recovery reports that, with what it means.
    if volumes.open(Volume::Writable).is_ok() {
        probe_again(volumes, store, mount_options);
    }
    Ok(())
}

/// Refuses an image volume whose file system cannot hold layers, before the first snapshot
/// is made. Later, one that is full or has become read-only must not prevent what can still
/// be done.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] saying what it cannot do.
pub fn require_layers(volumes: &Volumes, store: &Store, mount_options: &[String]) -> Result<()> {
    if !store.read()?.is_untouched()? {
        return Ok(());
    }
    // In the trash, so that what a crash leaves is deleted with it.
    let image = volumes.image().dirs();
    image.trash_fd()?;
    let directory = format!("{}/trash", image.path());
    clear_probe(&directory)?;
    let probed = mount::probe_layers(&Path::new(&directory).join(PROBE), mount_options);
    let probed = probed.context(|| {
        let path = image.path();
        format!(
            "the file system of {path} cannot hold image layers: use another one, for example ext4"
        )
    });
    probed.and(clear_probe(&directory))
}

/// Makes the writable directory, with the snapshots that are there already, the volume
/// that the database knows. An import then enters those snapshots.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if it belongs to another root, or if it cannot hold
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

/// What the result of a probe depends on: with another kernel, on another file system
/// or with other mount options the volume is probed again.
fn circumstances(volumes: &Volumes, mount_options: &[String]) -> Result<String> {
    Ok(format!(
        "{} {} {}",
        mount::kernel_release(),
        volumes.writable_file_system()?,
        mount_options.join(",")
    ))
}

/// Probes again whether a volume that was taken into use earlier can hold what
/// containers write, and only logs a failure: a volume that is full or has become
/// read-only must not prevent what can still be done.
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
        log::warn!("{}", error.chain());
    }
}

/// Expects the writable volume that the database knows, if it knows one.
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
/// [`ErrorKind::DataLoss`] if what the database has recorded is no identity.
pub fn known(store: &Store) -> Result<Option<(Identity, bool)>> {
    let rows = store.read()?;
    let is_claimed = rows.fact(CLAIMED)?.is_some();
    let Some(text) = rows.fact(IDENTITY)? else {
        return Ok(None);
    };
    let identity = Identity::parse(&text).ok_or_else(|| {
        let what = format!("the database is damaged: the writable volume is {text:?}");
        Error::data_loss(what)
    })?;
    Ok(Some((identity, is_claimed)))
}

/// Replaces the writable volume that the database knows, which is not coming back, by a
/// new one, which [`set_up`] then marks. The writable directory is examined first, so
/// that a refusal leaves everything as it was.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if the volume is there, if the directory is
/// another root's volume, holds snapshots or cannot hold upper directories.
pub fn give_up(volumes: &Volumes, store: &Store, mount_options: &[String]) -> Result<()> {
    let path = volumes.writable_path();
    match volumes.open(Volume::Writable) {
        Ok(_) => {
            return Err(Error::refused(format!(
                "the writable volume is at {path}, where it belongs: there is nothing to reset"
            )));
        }
        Err(error) if error.kind() == ErrorKind::FailedPrecondition => {}
        // The volume's own disk may have failed: then the volume is not missing.
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

/// Refuses a directory that is marked as another volume, or that has something
/// where snapshots and trash would be: that would be taken for strays.
fn require_free(volumes: &Volumes, identity: &Identity) -> Result<()> {
    let path = volumes.writable_path();
    match volumes.look_at_writable(identity)? {
        Claim::Foreign(other) => Err(foreign(path, &other)),
        Claim::Free if volumes.writable_holding()? == Holding::OurNames => {
            Err(Error::refused(format!(
                "the writable directory {path} has no mark, and something in {path}/snapshots or \
                 {path}/trash: give another --writable-dir, or move that away"
            )))
        }
        Claim::Ours | Claim::Free => Ok(()),
    }
}

fn foreign(path: &str, other: &Identity) -> Error {
    Error::refused(format!(
        "the writable directory {path} is the volume {other} of another root: give another \
         --writable-dir, or, if nothing else uses it, empty it and remove {path}/.volume"
    ))
}

/// Whether the writable directory is a volume that has been emptied: it is mounted, and
/// nothing is in it. If it is anything else, the volume is missing.
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

/// Probes the directory and then marks it: an unsuitable directory is left as it was,
/// and the next start may take another.
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

/// Records which volume is about to be marked. A refusal comes before this: the database
/// must not name a volume that never was.
fn record(store: &Store, identity: &Identity) -> Result<()> {
    let mut transaction = store.write()?;
    transaction.record_fact(IDENTITY, &identity.to_string())?;
    transaction.commit()
}

/// Probes in a directory of its own, which the next start removes if a crash leaves it.
fn probe(volumes: &Volumes, mount_options: &[String]) -> Result<()> {
    let scratch = Path::new(volumes.writable_path()).join(PROBE);
    clear_probe(volumes.writable_path())?;
    let probed = mount::probe_upper(&scratch, mount_options).context(|| {
        format!(
            "the file system of {} cannot hold what containers write (overlayfs's upper \
             directory): use another one, for example ext4",
            volumes.writable_path()
        )
    });
    // Also after a failure: a refused directory is left as it was.
    probed.and(clear_probe(volumes.writable_path()))
}

/// Removes what a probe that was cut short has left in the writable directory.
pub fn clear_probe(writable: &str) -> Result<()> {
    let scratch = Path::new(writable).join(PROBE);
    mount::unmount_stale(&scratch.join(mount::MERGED));
    match std::fs::remove_dir_all(&scratch) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.context(|| format!("remove {}", scratch.display())),
    }
}
