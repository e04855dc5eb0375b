//! Taking the writable volume into use: marked at the first start, recognised
//! at later ones, and asked whether containers can write there.

use std::path::Path;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::mount;
use crate::store::Store;
use crate::types::Volume;
use crate::volume::{Claim, Holding, Identity, Lifetime, Volumes};

/// Facts in the database: the volume's identity, and whether its mark is known
/// to be on the disk. The first is recorded before the mark is written, so
/// that a crash in between is told from a disk that is not mounted.
pub(super) const IDENTITY: &str = "writable_volume";
const CLAIMED: &str = "writable_volume_claimed";
/// Under what the volume was found fit for overlayfs's upper directories.
const PROBED: &str = "writable_volume_probed";
/// The directory in which it is probed.
const PROBE: &str = ".probe";

/// Makes the writable directory the volume that the database knows. One that
/// is missing at a later start is no error: what does not need it is served.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if at the first start it belongs to
/// another root, or if it cannot hold overlayfs's upper directories.
pub fn set_up(
    volumes: &Volumes,
    store: &Store,
    lifetime: Lifetime,
    mount_options: &[String],
) -> Result<()> {
    let (identity, is_claimed) = recorded(store)?;
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
    // Whether it is there is told by recovery, with what it means.
    if volumes.open(Volume::Writable).is_ok() {
        probe_again(volumes, store, mount_options);
    }
    Ok(())
}

/// Makes the writable directory the volume that the database knows, with the
/// snapshots that are there already, which the database is going to have.
///
/// # Errors
///
/// As of [`set_up`].
pub fn adopt(volumes: &Volumes, store: &Store, mount_options: &[String]) -> Result<()> {
    let (identity, _) = recorded(store)?;
    if let Claim::Foreign(other) = volumes.look_at_writable(&identity)? {
        return Err(foreign(volumes.writable_path(), &other));
    }
    mark(volumes, store, &identity, mount_options)?;
    volumes.expect_writable(identity);
    Ok(())
}

/// Under what a probe has been passed: with another kernel, on another file
/// system or with other options it is worth another.
fn circumstances(volumes: &Volumes, mount_options: &[String]) -> Result<String> {
    Ok(format!(
        "{} {} {}",
        mount::kernel_release(),
        volumes.writable_file_system()?,
        mount_options.join(",")
    ))
}

/// Looks whether a volume that was taken into use earlier can still hold what
/// containers write. It could once, and one that is full or has become read-only
/// must not keep what can be done from being done: so this is for the log.
fn probe_again(volumes: &Volumes, store: &Store, mount_options: &[String]) {
    let probed = || {
        let now = circumstances(volumes, mount_options)?;
        if store.read()?.fact(PROBED)?.as_deref() == Some(&*now) {
            return Ok(());
        }
        probe(volumes, mount_options)?;
        let mut transaction = store.write()?;
        transaction.rows().record_fact(PROBED, &now)?;
        transaction.commit()
    };
    if let Err(error) = probed() {
        log::warn!("{}", error.chain());
    }
}

/// Expects the writable volume that the database knows, if it knows one.
///
/// # Errors
///
/// Those of the database; [`ErrorKind::DataLoss`] if what it has is no identity.
pub fn expect_recorded(volumes: &Volumes, store: &Store) -> Result<()> {
    if let Some(text) = store.read()?.fact(IDENTITY)? {
        volumes.expect_writable(parse(&text)?);
    }
    Ok(())
}

/// Which writable volume the database knows, and whether it is known to carry its
/// mark; `None` if it knows none.
///
/// # Errors
///
/// As of [`expect_recorded`].
pub fn known(store: &Store) -> Result<Option<(Identity, bool)>> {
    let rows = store.read()?;
    let is_claimed = rows.fact(CLAIMED)?.is_some();
    let identity = rows.fact(IDENTITY)?.map(|text| parse(&text)).transpose()?;
    Ok(identity.map(|identity| (identity, is_claimed)))
}

/// Has the database expect a new volume, which [`set_up`] then marks: the one
/// that it knows is not coming back. Looks first whether the writable directory
/// will do, so that a refusal leaves everything as it was.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if the volume is there, if the directory is
/// another root's volume, holds snapshots or cannot hold upper directories; as of
/// its disk; those of the database.
pub fn give_up(volumes: &Volumes, store: &Store, mount_options: &[String]) -> Result<()> {
    let path = volumes.writable_path();
    match volumes.open(Volume::Writable) {
        Ok(_) => {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "the writable volume is at {path}, where it belongs: there is nothing to reset"
                ),
            ));
        }
        Err(error) if error.kind() == ErrorKind::FailedPrecondition => {}
        // Its own disk may have failed: that is no missing volume.
        Err(error) => return Err(error),
    }
    let identity = Identity::random()?;
    require_free(volumes, &identity)?;
    probe(volumes, mount_options)?;
    let mut transaction = store.write()?;
    transaction.rows().forget_fact(CLAIMED)?;
    transaction
        .rows()
        .record_fact(IDENTITY, &identity.to_string())?;
    transaction.commit()
}

/// Refuses a directory that is marked as another volume, or that has something
/// where snapshots and trash would be: that would be taken for strays.
fn require_free(volumes: &Volumes, identity: &Identity) -> Result<()> {
    let path = volumes.writable_path();
    match volumes.look_at_writable(identity)? {
        Claim::Foreign(other) => Err(foreign(path, &other)),
        Claim::Free if volumes.writable_holding()? == Holding::OurNames => Err(Error::new(
            ErrorKind::FailedPrecondition,
            format!(
                "the writable directory {path} has no mark, and something in {path}/snapshots or \
                 {path}/trash: give another --writable-dir, or move that away"
            ),
        )),
        Claim::Ours | Claim::Free => Ok(()),
    }
}

fn foreign(path: &str, other: &Identity) -> Error {
    Error::new(
        ErrorKind::FailedPrecondition,
        format!(
            "the writable directory {path} is the volume {other} of another root: give another \
             --writable-dir, or, if nothing else uses it, empty it and remove {path}/.volume"
        ),
    )
}

fn parse(text: &str) -> Result<Identity> {
    Identity::parse(text).ok_or_else(|| {
        Error::new(
            ErrorKind::DataLoss,
            format!("the database is damaged: the writable volume is {text:?}"),
        )
    })
}

/// Whether the writable directory is a volume that has been made anew: mounted,
/// and nothing in it. Anything else is waited for as any other volume is.
fn is_emptied(volumes: &Volumes, identity: &Identity) -> Result<bool> {
    // In this order: the look creates the directory.
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
    require_free(volumes, identity)?;
    mark(volumes, store, identity, mount_options)
}

/// Probed before it is marked: a directory that turns out to be unsuitable is
/// left as it was, and the next start may take another.
fn mark(
    volumes: &Volumes,
    store: &Store,
    identity: &Identity,
    mount_options: &[String],
) -> Result<()> {
    probe(volumes, mount_options)?;
    volumes.claim_writable(identity)?;
    let mut transaction = store.write()?;
    transaction.rows().record_fact(CLAIMED, "yes")?;
    let circumstances = circumstances(volumes, mount_options)?;
    transaction.rows().record_fact(PROBED, &circumstances)?;
    transaction.commit()
}

fn recorded(store: &Store) -> Result<(Identity, bool)> {
    let mut transaction = store.write()?;
    let is_claimed = transaction.rows().fact(CLAIMED)?.is_some();
    let identity = match transaction.rows().fact(IDENTITY)? {
        Some(text) => parse(&text)?,
        None => {
            let identity = Identity::random()?;
            transaction
                .rows()
                .record_fact(IDENTITY, &identity.to_string())?;
            identity
        }
    };
    transaction.commit()?;
    Ok((identity, is_claimed))
}

/// In a directory of its own, which the next start removes if a crash left it.
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
    // Whatever it came to: a refused directory is left as it was.
    probed.and(clear_probe(volumes.writable_path()))
}

/// Removes what a probe that was cut short has left in the writable directory.
///
/// # Errors
///
/// [`ErrorKind::Internal`] if it cannot be removed.
pub fn clear_probe(writable: &str) -> Result<()> {
    let scratch = Path::new(writable).join(PROBE);
    mount::unmount_stale(&scratch.join(mount::MERGED));
    match std::fs::remove_dir_all(&scratch) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::caused(
            ErrorKind::Internal,
            format!("remove {}", scratch.display()),
            error,
        )),
        _ => Ok(()),
    }
}
