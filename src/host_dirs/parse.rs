//! Parsing the text of labels and flags that name host directories. Pure.

use crate::error::{Error, Result};
use crate::types::Quoted;

/// The most host directories of one snapshot. So many paths, together with the shortened
/// paths of 128 layers with ids of seven digits, fit into the page that mount(2) takes.
pub const MAX_PATHS: usize = 32;

/// Reads host directories separated by colons. Empty parts are skipped, and so
/// are `.` and doubled slashes; the order is kept.
///
/// # Errors
///
/// `ErrorKind::InvalidArgument` for a path that is not absolute, contains `..`, or
/// contains a character with a meaning in mount options; and for more than
/// [`MAX_PATHS`] paths.
pub fn parse_paths(text: &str) -> Result<Vec<String>> {
    let parts = || text.split(':').filter(|part| !part.is_empty());
    let count = parts().count();
    if count > MAX_PATHS {
        return Err(invalid(format!(
            "the list names {count} directories, but at most {MAX_PATHS} are possible"
        )));
    }
    parts().map(parse_path).collect()
}

fn parse_path(path: &str) -> Result<String> {
    let refuse = |why: &str| Err(invalid(format!("{} {why}", Quoted(path))));
    if path.contains(|c: char| matches!(c, ',' | '\\') || c.is_control()) {
        return refuse(
            "has a comma, a backslash or a control character, which mean something in mount \
             options: use a path without them",
        );
    }
    if !path.starts_with('/') {
        return refuse("is not absolute: begin it with \"/\"");
    }
    let mut normal = String::with_capacity(path.len());
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => return refuse("has \"..\": give a path without it"),
            name => {
                normal.push('/');
                normal.push_str(name);
            }
        }
    }
    if normal.is_empty() {
        return refuse("is the root of all file systems: name a directory in it");
    }
    Ok(normal)
}

/// The rest of `path` after `prefix`, both normalised: empty if both are the
/// same directory, `None` if `path` is not below `prefix`.
pub fn strip_prefix<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    let rest = path.strip_prefix(prefix)?;
    if rest.is_empty() || prefix == "/" {
        return Some(rest);
    }
    rest.strip_prefix('/')
}

/// The host directories for the containers of some images (`--lower-for`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRule {
    pattern: String,
    paths: Vec<String>,
}

impl ImageRule {
    /// Reads `PATTERN=PATH[:PATH…]`.
    ///
    /// # Errors
    ///
    /// `ErrorKind::InvalidArgument` if the pattern or the paths are missing.
    pub fn parse(text: &str) -> Result<ImageRule> {
        // The name of an image cannot contain `=`.
        let (pattern, paths) = text.split_once('=').unwrap_or((text, ""));
        let paths = parse_paths(paths)?;
        if pattern.is_empty() || paths.is_empty() {
            return Err(invalid(format!(
                "{} names no image or no directory: write IMAGE_PATTERN=PATH[:PATH...]",
                Quoted(text)
            )));
        }
        Ok(ImageRule {
            pattern: pattern.to_owned(),
            paths,
        })
    }

    /// The directories, the topmost first.
    pub fn paths(&self) -> &[String] {
        &self.paths
    }

    /// Whether the pattern matches the whole name of an image; `*` stands for
    /// any number of characters.
    pub fn matches(&self, image: &str) -> bool {
        let mut pieces = self.pattern.split('*');
        let first = pieces.next().unwrap_or_default();
        let Some(mut rest) = image.strip_prefix(first) else {
            return false;
        };
        let Some(last) = pieces.next_back() else {
            return rest.is_empty();
        };
        // The earliest match of each piece between two stars is the best one:
        // it leaves the longest rest to the pieces after it.
        for piece in pieces {
            let Some(at) = rest.find(piece) else {
                return false;
            };
            rest = &rest[at + piece.len()..];
        }
        rest.ends_with(last)
    }
}

fn invalid(what: String) -> Error {
    Error::invalid(what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn paths_keep_their_order_and_empty_parts_are_skipped() {
        let paths = parse_paths(":/b//c/:::/a/./d:/with blank/é:").unwrap();
        assert_eq!(paths, ["/b/c", "/a/d", "/with blank/é"]);
        assert_eq!(parse_paths("").unwrap(), [""; 0]);
        assert_eq!(parse_paths(":::").unwrap(), [""; 0]);
    }

    #[test]
    fn what_could_inject_or_lead_away_is_refused() {
        for path in [
            "/a,b", "/a\\b", "/a\\:b", "/a\nb", "/a\0", "/a\u{7f}", "a", "./a", "/a/../b", "/..",
            "/", "//.", "/ok:b", " /a",
        ] {
            let error = parse_paths(path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{path:?}");
            assert_eq!(error.chain().lines().count(), 1);
        }
        assert!(parse_paths("/..a/b..").is_ok());
        assert!(parse_paths(&"/a:".repeat(MAX_PATHS)).is_ok());
        let error = parse_paths(&"/a:".repeat(1000)).unwrap_err();
        assert!(error.chain().contains("at most 32"), "{}", error.chain());
    }

    #[test]
    fn a_prefix_ends_with_a_name() {
        assert_eq!(strip_prefix("/a/b", "/a"), Some("b"));
        assert_eq!(strip_prefix("/a", "/a"), Some(""));
        assert_eq!(strip_prefix("/ab", "/a"), None);
        assert_eq!(strip_prefix("/b/a", "/a"), None);
        assert_eq!(strip_prefix("/b/a", "/"), Some("b/a"));
    }

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, image, expected) in [
            ("*", "", true),
            ("*", "docker.io/library/a:1", true),
            ("docker.io/library/a:1", "docker.io/library/a:1", true),
            ("docker.io/library/a", "docker.io/library/a:1", false),
            ("docker.io/library/a:*", "docker.io/library/a:1", true),
            ("docker.io/library/a:*", "docker.io/library/ab:1", false),
            ("*/a:*", "docker.io/library/a:1", true),
            ("*/b:*", "docker.io/library/a:1", false),
            ("*a*b*c", "xaxbxbxc", true),
            ("*a*b*c", "xaxbxbx", false),
            ("ab*ba", "aba", false),
            ("ab*ba", "abba", true),
            ("a**b", "ab", true),
            ("?", "a", false),
        ] {
            let rule = ImageRule::parse(&format!("{pattern}=/x")).unwrap();
            assert_eq!(rule.matches(image), expected, "{pattern} {image}");
        }
    }

    #[test]
    fn a_rule_has_an_image_and_directories() {
        let rule = ImageRule::parse("reg:5000/a:1=/x:/y=z").unwrap();
        assert_eq!(rule.paths(), ["/x", "/y=z"]);
        assert!(rule.matches("reg:5000/a:1"));
        for wrong in ["", "a", "a=", "=/x", "a=x", "a=:", "a=/x,y"] {
            let error = ImageRule::parse(wrong).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{wrong:?}");
        }
    }
}
