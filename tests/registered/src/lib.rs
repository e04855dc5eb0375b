//! `#[registered(TYPE)]` adds a test function to the list of its test binary.
//!
//! libtest's `#[test]` cannot leave tests out at run time, so the test binaries of this
//! project have a `main` of their own. This attribute saves them from lists of names.

use proc_macro::{TokenStream, TokenTree};

/// Registers a function as a `TYPE`, which `inventory` collects. `TYPE` is a tuple
/// struct of the function's module, its name and the function itself.
#[proc_macro_attribute]
pub fn registered(kind: TokenStream, function: TokenStream) -> TokenStream {
    let mut tokens = function.clone().into_iter();
    let is_fn = |token: &TokenTree| matches!(token, TokenTree::Ident(word) if word.to_string() == "fn");
    tokens.find(is_fn).expect("only a function can be registered");
    let name = tokens.next().expect("a function has a name").to_string();
    let registration =
        format!("::inventory::submit! {{ {kind}(module_path!(), {name:?}, {name}) }}");
    let mut all = function;
    all.extend(registration.parse::<TokenStream>().expect("this is Rust"));
    all
}
