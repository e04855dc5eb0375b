//! The options that overlay mounts need on the running kernel, in addition to the
//! configured ones.
//!
//! The options are chosen for each mount, because the overlay module may be loaded long
//! after the start of the daemon, and its defaults can be changed at any time. As long as
//! the module's parameters cannot be read, the kernel's version decides.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use super::{kernel_release, kernel_version, probe_user_namespace};

/// The facts about a new overlay mount on which its options depend.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Options that the administrator has configured; they are never changed.
    pub configured: &'a [String],
    /// Whether host directories may be among the lower directories.
    pub allows_host_dirs: bool,
    /// Whether the overlay's directories are on several file systems.
    pub spans_file_systems: bool,
}

/// The options of an overlay mount that do not name its directories.
pub fn overlay_options(wanted: &Wanted<'_>) -> Vec<String> {
    static IN_USER_NAMESPACE: OnceLock<bool> = OnceLock::new();
    let kernel = Kernel {
        version: kernel_version(&kernel_release()),
        in_user_namespace: *IN_USER_NAMESPACE.get_or_init(probe_user_namespace),
        parameter: module_parameter,
    };
    kernel.options(wanted)
}

/// The present value of a parameter of the overlay module. The value is the default for
/// mounts that do not set the option. `None` if the kernel does not have the parameter, or
/// has not loaded the module yet.
fn module_parameter(name: &str) -> Option<String> {
    let path = Path::new("/sys/module/overlay/parameters").join(name);
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim_end().to_owned())
}

/// The effect of leaving an option out of a mount on this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unnamed {
    /// The kernel does not know the option, and refuses a mount that names it.
    Unknown,
    Off,
    On,
    /// The default is unknown: the module is not loaded yet, or hides its parameters.
    OnOrOff,
}

struct Kernel<P> {
    version: Option<(u32, u32)>,
    in_user_namespace: bool,
    parameter: P,
}

impl<P: Fn(&str) -> Option<String>> Kernel<P> {
    /// The effect of leaving out the option `parameter`, which the overlay module has since
    /// Linux `since`.
    fn unnamed(&self, parameter: &str, since: (u32, u32)) -> Unnamed {
        match (self.parameter)(parameter).as_deref() {
            Some("N") => Unnamed::Off,
            Some(_) => Unnamed::On,
            None if self.version >= Some(since) => Unnamed::OnOrOff,
            None => Unnamed::Unknown,
        }
    }

    fn options(&self, wanted: &Wanted<'_>) -> Vec<String> {
        let is_free = |name: &str| {
            let mut names = wanted.configured.iter().map(|it| it.split('=').next());
            !names.any(|configured| configured == Some(name))
        };
        let mut options = Vec::new();
        // With the option `index`, overlayfs refuses to mount a container's upper directory
        // if the inode of its topmost layer has changed, which happens when the layer
        // moves. The mount names the option even if the default is off, because the default
        // may be switched on before the next mount of the container.
        let knows_index = self.version >= Some((4, 13)) || (self.parameter)("index").is_some();
        if is_free("index") && knows_index {
            options.push("index=off".to_owned());
        }
        // With these options, an upper directory refers to files of its lower directories.
        // The references would break, because host directories change. Some kernels switch
        // the options on by default.
        for (name, since) in [("metacopy", (4, 19)), ("redirect_dir", (4, 10))] {
            let may_be_on = || matches!(self.unnamed(name, since), Unnamed::On | Unnamed::OnOrOff);
            if wanted.allows_host_dirs && is_free(name) && may_be_on() {
                options.push(format!("{name}=off"));
            }
        }
        // Without xino, a directory's inode number changes while programs use it, and
        // files have another device number than their directory (overlayfs.rst, "Inode
        // properties"). If xino is on by default, the mount does not name it, because
        // BuildKit compares whole trees when it finds an option that it does not know.
        let may_be_off = || {
            matches!(
                self.unnamed("xino_auto", (4, 17)),
                Unnamed::Off | Unnamed::OnOrOff
            )
        };
        if wanted.spans_file_systems && is_free("xino") && may_be_off() {
            options.push("xino=auto".to_owned());
        }
        if self.in_user_namespace && is_free("userxattr") {
            options.push("userxattr".to_owned());
        }
        options.extend_from_slice(wanted.configured);
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(
        version: (u32, u32),
        parameters: &[(&str, &str)],
        wanted: &Wanted<'_>,
    ) -> Vec<String> {
        let parameter = |name: &str| {
            let found = parameters.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let kernel = Kernel {
            version: Some(version),
            in_user_namespace: false,
            parameter,
        };
        kernel.options(wanted)
    }

    #[test]
    fn options_do_not_wait_for_the_module() {
        const OFF: &[(&str, &str)] = &[("index", "N"), ("xino_auto", "N"), ("metacopy", "N")];
        const ON: &[(&str, &str)] = &[("index", "Y"), ("xino_auto", "Y"), ("metacopy", "Y")];
        const NONE: &[(&str, &str)] = &[];
        let chosen = ["xino=off".to_owned(), "index=on".to_owned()];
        let wanted = |configured, allows_host_dirs, spans_file_systems| Wanted {
            configured,
            allows_host_dirs,
            spans_file_systems,
        };
        let plain = wanted(&[], false, false);
        let spans = wanted(&[], false, true);
        let host_dirs = wanted(&[], true, true);
        let configured = wanted(&chosen, false, true);
        type Row<'a> = (
            (u32, u32),
            &'a [(&'a str, &'a str)],
            Wanted<'a>,
            &'a [&'a str],
        );
        let table: &[Row<'_>] = &[
            ((6, 1), OFF, plain, &["index=off"]),
            ((6, 1), ON, plain, &["index=off"]),
            ((6, 1), NONE, plain, &["index=off"]),
            ((6, 1), OFF, spans, &["index=off", "xino=auto"]),
            ((6, 1), ON, spans, &["index=off"]),
            ((6, 1), NONE, spans, &["index=off", "xino=auto"]),
            (
                (6, 1),
                ON,
                host_dirs,
                &["index=off", "metacopy=off", "redirect_dir=off"],
            ),
            (
                (6, 1),
                NONE,
                host_dirs,
                &["index=off", "metacopy=off", "redirect_dir=off", "xino=auto"],
            ),
            ((4, 16), NONE, host_dirs, &["index=off", "redirect_dir=off"]),
            ((4, 4), NONE, host_dirs, &[]),
            // A distribution's kernel may know more than its version says.
            ((3, 10), OFF, spans, &["index=off", "xino=auto"]),
            ((6, 1), OFF, configured, &["xino=off", "index=on"]),
        ];
        for (version, parameters, wanted, expected) in table {
            let found = options(*version, parameters, wanted);
            assert_eq!(found, *expected, "{version:?} {parameters:?} {wanted:?}");
        }
    }
}
