//! A thread that works beside the requests and ends with the value that stands
//! for it.

use std::thread::{self, JoinHandle};

use crate::error::{Error, ErrorKind, Result};

/// A running thread; told to end, and waited for, when dropped.
pub struct Background {
    name: &'static str,
    tell_to_end: Box<dyn Fn() + Send>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Starts `work` in a thread of that name, of which `tell_to_end` has to make
    /// an end.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] if the system gives no thread.
    pub fn start(
        name: &'static str,
        tell_to_end: impl Fn() + Send + 'static,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<Background> {
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)
            .map_err(|error| {
                Error::caused(ErrorKind::Internal, format!("start the {name}"), error)
            })?;
        Ok(Background {
            name,
            tell_to_end: Box::new(tell_to_end),
            thread: Some(thread),
        })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        (self.tell_to_end)();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the {} has ended by a bug; the log says where", self.name);
        }
    }
}
