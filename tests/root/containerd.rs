//! Placeholder header.

use crate::Test;

pub const TESTS: &[Test] = &[];
