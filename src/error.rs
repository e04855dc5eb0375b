//! The one error type.
//!
//! Owns: the kinds of errors, and how a chain of causes is kept and printed. An error's text
//! states its own facts and never repeats its source; [`Error::chain`] prints them all. The
//! place where an error arises sets its kind; callers add what they were doing, and never
//! change the kind. Never: decides what to do.
//!
//! A doc comment has an `# Errors` section only where it names a kind that callers rely
//! on. Every fallible function can also fail because the disk, the database or the
//! kernel fails; the sections do not repeat this.

use std::fmt;

use rustix::io::Errno;

/// `Result` with our error.
pub type Result<T> = std::result::Result<T, Error>;

/// What an error means to the caller. The service maps each kind to a gRPC code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// No snapshot has that key or name. Only the store returns this kind.
    NotFound,
    /// The key or name is taken. Only the store returns this kind.
    AlreadyExists,
    /// The request itself is wrong, in any state of the snapshots and the
    /// machine.
    InvalidArgument,
    /// The request is sound, but the state of a snapshot, a volume or the
    /// machine forbids the request.
    FailedPrecondition,
    /// A disk, a quota or a table is full.
    ResourceExhausted,
    /// The daemon is starting, stopping or busy: the same request may succeed
    /// later.
    Unavailable,
    /// The caller has gone, or does not wait any longer.
    Cancelled,
    /// Data that should be on a disk is missing or damaged.
    DataLoss,
    /// A bug, or a fault of the machine.
    Internal,
}

/// What went wrong, on which object, and why.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    what: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error without a cause.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Error {
        Error {
            kind,
            what: what.into(),
            source: None,
        }
    }

    /// [`ErrorKind::FailedPrecondition`]: the state of a snapshot, a volume or the
    /// machine forbids the request.
    pub fn refused(what: impl Into<String>) -> Error {
        Error::new(ErrorKind::FailedPrecondition, what)
    }

    /// [`ErrorKind::InvalidArgument`]: the request itself is wrong.
    pub fn invalid(what: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidArgument, what)
    }

    /// [`ErrorKind::DataLoss`]: something that should be on a disk is missing or damaged.
    pub fn data_loss(what: impl Into<String>) -> Error {
        Error::new(ErrorKind::DataLoss, what)
    }

    /// An error that another one caused; `what` says what was being done.
    pub fn caused(
        kind: ErrorKind,
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        Error {
            kind,
            what: what.into(),
            source: Some(source.into()),
        }
    }

    /// A failed system call; `what` names the call's purpose and the path.
    /// A full disk or quota is [`ErrorKind::ResourceExhausted`], a read-only
    /// one [`ErrorKind::FailedPrecondition`], all else [`ErrorKind::Internal`].
    pub fn system(errno: Errno, what: impl Into<String>) -> Error {
        let kind = match errno {
            Errno::NOSPC | Errno::DQUOT => ErrorKind::ResourceExhausted,
            Errno::ROFS => ErrorKind::FailedPrecondition,
            _ => ErrorKind::Internal,
        };
        Error::caused(kind, what, std::io::Error::from(errno))
    }

    /// A failed system call on something that has to be on a disk: if it is absent, or
    /// something else is in its place, the kind is [`ErrorKind::DataLoss`], and otherwise the
    /// kind is that of [`Error::system`].
    pub fn missing(errno: Errno, what: impl Into<String>) -> Error {
        match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP => {
                Error::caused(ErrorKind::DataLoss, what, std::io::Error::from(errno))
            }
            _ => Error::system(errno, what),
        }
    }

    /// Adds what the caller was doing. The kind stays the same.
    #[must_use]
    pub fn while_doing(self, what: impl Into<String>) -> Error {
        Error {
            kind: self.kind,
            what: what.into(),
            source: Some(Box::new(self)),
        }
    }

    /// The kind, as set where the error arose.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The error and all its causes on one line, outermost first: `doing a: doing b: cause`.
    pub fn chain(&self) -> String {
        let mut text = self.what.clone();
        let mut next = std::error::Error::source(self);
        while let Some(error) = next {
            text.push_str(": ");
            text.push_str(&error.to_string());
            next = error.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.what)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn std::error::Error + 'static))
    }
}

/// Adds what was being done to a failed system call or a failed step.
pub trait Context<T> {
    /// Adds to an error what was being done. `what` is only called if there is an error.
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Context<T> for std::result::Result<T, Errno> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|errno| Error::system(errno, what()))
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| match Errno::from_io_error(&error) {
            Some(errno) => Error::system(errno, what()),
            None => Error::caused(ErrorKind::Internal, what(), error),
        })
    }
}

impl<T> Context<T> for Result<T> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| error.while_doing(what()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_told_once_outermost_first() {
        let error = Error::system(Errno::NOSPC, "create directory /a")
            .while_doing("prepare snapshot \"k\"");
        assert_eq!(
            error.chain(),
            "prepare snapshot \"k\": create directory /a: No space left on device (os error 28)"
        );
        assert_eq!(error.to_string(), "prepare snapshot \"k\"");
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    }

    #[test]
    fn full_and_read_only_disks_have_kinds_of_their_own() {
        let kind = |errno| Error::system(errno, "x").kind();
        assert_eq!(kind(Errno::DQUOT), ErrorKind::ResourceExhausted);
        assert_eq!(kind(Errno::ROFS), ErrorKind::FailedPrecondition);
        assert_eq!(kind(Errno::NOENT), ErrorKind::Internal);
    }
}
