//! Builds selectors from tokens.
//!
//! Owns the order of tokens and which quotes are allowed where. It never looks
//! at a snapshot. There is no recursion: a filter is a flat list.
//!
//! Follows containerd's `filters/parser.go`, including where white space is
//! allowed: before a field, an operator or a value, but not before a separator
//! and not at the end.

use super::error::Fault;
use super::scanner::{Scanner, Token};
use super::{Field, Selector, Test, pattern};

/// Parses one filter into the selectors that must all hold. The empty filter has no
/// selectors.
///
/// `patterns_left` is the number of regular expressions that may still be compiled
/// for the request. The function subtracts the number in this filter.
///
/// # Errors
///
/// Returns the first fault in reading order.
pub(super) fn parse(text: &str, patterns_left: &mut usize) -> Result<Vec<Selector>, Fault> {
    let mut selectors = Vec::new();
    // White space alone is not an empty filter: it lacks a field, and is refused.
    if text.is_empty() {
        return Ok(selectors);
    }
    let mut parser = Parser {
        scanner: Scanner::new(text),
        patterns_left,
    };
    loop {
        selectors.push(parser.selector()?);
        match parser.scanner.peek() {
            None => return Ok(selectors),
            Some(',') => parser.scanner.token()?,
            Some(_) => {
                return Err(Fault::new(
                    parser.scanner.position(),
                    "a comma or the end of the filter",
                ));
            }
        };
    }
}

struct Parser<'a, 'b> {
    scanner: Scanner<'a>,
    patterns_left: &'b mut usize,
}

impl Parser<'_, '_> {
    fn selector(&mut self) -> Result<Selector, Fault> {
        let field = self.field_path()?;
        let test = match self.scanner.peek() {
            None | Some(',') => Test::Present,
            Some(_) => self.comparison()?,
        };
        Ok(Selector { field, test })
    }

    fn field_path(&mut self) -> Result<Field, Fault> {
        let first = self.field()?;
        let mut others = Vec::new();
        let mut separator: &[u8] = b"";
        while self.scanner.peek() == Some('.') {
            self.scanner.token()?;
            others.extend_from_slice(separator);
            others.append(&mut self.field()?);
            separator = b".";
        }
        Ok(Field::resolve(&first, others))
    }

    fn field(&mut self) -> Result<Vec<u8>, Fault> {
        let (position, token) = self.scanner.token()?;
        match token {
            Token::Field(name) => Ok(name.as_bytes().to_vec()),
            Token::Quoted {
                quote: '"',
                content,
            } => Ok(content),
            Token::Quoted { .. } => Err(Fault::new(
                position,
                "a field name with no quotes other than \" around it",
            )),
            _ => Err(Fault::new(
                position,
                "a field name, bare or in double quotes",
            )),
        }
    }

    fn comparison(&mut self) -> Result<Test, Fault> {
        const OPERATORS: &str = "one of the operators ==, != and ~=";
        let (position, token) = self.scanner.token()?;
        let Token::Operator(operator) = token else {
            return Err(Fault::new(position, OPERATORS));
        };
        match operator {
            "==" => Ok(Test::Equal(self.value(false)?.1.into_boxed_slice())),
            "!=" => Ok(Test::NotEqual(self.value(false)?.1.into_boxed_slice())),
            "~=" => {
                let (position, text) = self.value(true)?;
                let Some(left) = self.patterns_left.checked_sub(1) else {
                    return Err(Fault::new(
                        position,
                        format!(
                            "at most {} regular expressions in a request",
                            pattern::MAX_PATTERNS
                        ),
                    ));
                };
                *self.patterns_left = left;
                pattern::compile(text)
                    .map(|regex| Test::Matches(Box::new(regex)))
                    .map_err(|expected| Fault::new(position, expected))
            }
            _ => Err(Fault::new(position, OPERATORS)),
        }
    }

    /// The value after an operator and the byte offset it starts at; only
    /// regular expressions may be delimited by `/` or `|`.
    fn value(&mut self, is_pattern: bool) -> Result<(usize, Vec<u8>), Fault> {
        let (position, token) = self.scanner.token()?;
        match token {
            Token::Value(text) => Ok((position, text.as_bytes().to_vec())),
            Token::Quoted { quote, content } if is_pattern || quote == '"' => {
                Ok((position, content))
            }
            Token::Quoted { .. } => Err(Fault::new(
                position,
                "a value with no quotes other than \" around it",
            )),
            _ => Err(Fault::new(position, "a value, bare or in quotes")),
        }
    }
}
