//! Which snapshots a filter matches: the cases of containerd's own tests, and more.

mod hostile;

use super::*;

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// One snapshot of a corpus: name, parent, kind, labels.
type Snapshot<'a> = (&'a str, &'a str, &'a str, &'a [(&'a str, &'a str)]);

/// The snapshots of containerd's own tests, whose field `other` is the parent here.
const CORPUS: &[Snapshot<'_>] = &[
    ("foo", "", "active", &[("foo", "true")]),
    ("bar", "", "view", &[]),
    (
        "foo",
        "",
        "committed",
        &[("foo", "present"), ("more complex label", "present")],
    ),
    ("bar", "", "active", &[("bar", "true")]),
    (
        "fooer",
        "",
        "active",
        &[("more complex label with \\ and \"", "present")],
    ),
    (
        "fooer",
        "",
        "active",
        &[("more complex label with \\ and \".post", "present")],
    ),
    ("baz", "too complex, yo", "active", &[]),
    ("bazo", "abc", "active", &[]),
    ("compound", "", "active", &[("foo", "omg_asdf.asdf-qwer")]),
];

const ALL: &[usize] = &[0, 1, 2, 3, 4, 5, 6, 7, 8];

/// The indices in the corpus of what the filters match.
fn matched(filters: &[&str]) -> Vec<usize> {
    let filters = Filters::parse(filters)
        .unwrap_or_else(|error| panic!("{filters:?} should be legal: {error}"));
    let is_match = |&(name, parent, kind, pairs): &Snapshot<'_>| {
        filters.matches(&Subject {
            name,
            parent,
            kind,
            labels: &labels(pairs),
        })
    };
    (0..CORPUS.len())
        .filter(|&index| is_match(&CORPUS[index]))
        .collect()
}

#[track_caller]
fn check(cases: &[(&str, &[usize])]) {
    for (filter, expected) in cases {
        assert_eq!(matched(&[filter]), *expected, "{filter}");
    }
}

fn refusal(filter: &str) -> String {
    match Filters::parse(&[filter]) {
        Ok(_) => panic!("{filter:?} should be refused"),
        Err(error) => error.to_string(),
    }
}

/// Checks where and with which words filters are refused.
#[track_caller]
fn check_refused(cases: &[(&str, usize, &str)]) {
    for (filter, position, expected) in cases {
        let message = refusal(filter);
        let ending = format!("\": at byte {position}: expected {expected}");
        assert!(message.ends_with(&ending), "{message} / {ending}");
    }
}

#[test]
fn presence() {
    check(&[
        ("", ALL),
        ("name", ALL),
        ("parent", ALL),
        ("kind", ALL),
        ("labels.foo", &[0, 2, 8]),
        ("labels.foo,name", &[0, 2, 8]),
        ("labels.nothing", &[]),
        ("labels", &[]),
        ("other", &[]),
        ("Name", &[]),
        ("\"labels.foo\"", &[]),
        ("\"\"", &[]),
    ]);
}

#[test]
fn equality() {
    check(&[
        ("labels.foo==true", &[0]),
        ("labels.foo==omg_asdf.asdf-qwer", &[8]),
        ("name==bar", &[1, 3]),
        ("name!=bar", &[0, 2, 4, 5, 6, 7, 8]),
        ("name==bar,labels.bar", &[3]),
        ("name==bar,labels.bar==true", &[3]),
        ("name==bar,labels.bar==wrong", &[]),
        ("parent==\"too complex, yo\"", &[6]),
        ("parent==\"\"", &[0, 1, 2, 3, 4, 5, 8]),
        ("kind==view", &[1]),
        ("kind!=active", &[1, 2]),
        ("kind==committed", &[2]),
    ]);
}

#[test]
fn regular_expressions() {
    check(&[
        ("parent~=[abc]+,name!=foo", &[6, 7]),
        ("parent~=/[abc]+/,name!=foo", &[6, 7]),
        ("parent~=/[abc]{1,2}/,name!=foo", &[6, 7]),
        ("parent~=|[abc]{1,2}|,name!=foo", &[6, 7]),
        (r#"parent~=/[abc]{0,1}"\//,name!=foo"#, &[]),
        ("name~=^ba", &[1, 3, 6, 7]),
        ("name~=o$", &[0, 2, 7]),
        (r"name~=^\w{3}$", &[0, 1, 2, 3, 6]),
        ("name~=/^(?:foo|bazo)$/", &[0, 2, 7]),
        ("kind~=\"^(view|committed)$\"", &[1, 2]),
    ]);
}

#[test]
fn quoted_fields() {
    check(&[
        (r#"name==foo,labels."more complex label""#, &[2]),
        (
            r#"labels."more complex label with \\ and \""==present"#,
            &[4],
        ),
        (
            r#"labels."more complex label with \\ and \"".post==present"#,
            &[5],
        ),
        (r#""name"=="bar""#, &[1, 3]),
        (r#""labels"."foo"=="true""#, &[0]),
        (r#""\x6e\141me"=="\u0062\U00000061r""#, &[1, 3]),
    ]);
}

#[test]
fn absent_fields_compare_as_empty_except_for_equality() {
    check(&[
        ("labels.foo==\"\"", &[]),
        ("labels.foo!=\"\"", &[0, 2, 8]),
        ("labels.foo!=true", &[1, 2, 3, 4, 5, 6, 7, 8]),
        ("labels.foo~=^$", &[1, 3, 4, 5, 6, 7]),
        ("labels.foo~=\"\"", ALL),
        ("labels.foo~=/./", &[0, 2, 8]),
        ("unknown==\"\"", &[]),
        ("unknown!=\"\"", &[]),
        ("unknown!=x", ALL),
        ("unknown.path.to~=^$", ALL),
    ]);
}

#[test]
fn what_follows_a_plain_field_is_ignored() {
    check(&[
        ("name.x.\"y z\"==bar", &[1, 3]),
        ("kind.name==view", &[1]),
        ("parent.labels==abc", &[7]),
    ]);
}

#[test]
fn label_keys() {
    let labels = labels(&[
        ("", "empty"),
        ("containerd.io/gc.root", "now"),
        ("a..b", "dots"),
        ("牛", "moo"),
    ]);
    let subject = Subject {
        name: "",
        parent: "",
        kind: "unheard of",
        labels: &labels,
    };
    for (filter, expected) in [
        ("labels", true),
        ("labels.\"\"", true),
        ("labels==empty", true),
        ("labels.\"containerd.io/gc.root\"==now", true),
        ("labels.\"containerd.io/gc\".root==now", true),
        ("labels.containerd.\"io/gc\".root==now", true),
        ("labels.a.\"\".b==dots", true),
        ("labels.\"a.\".b==dots", true),
        ("labels.a.b", false),
        ("labels.\"牛\"==moo", true),
        (r#"labels."\u725b"==moo"#, true),
        (r#"labels."\xe7\x89"."\x9b""#, false),
        (r#"labels."\xe7\x89\x9b"==moo"#, true),
        // Keys that no label can have are legal and absent.
        (r#"labels."\xe7""#, false),
        (r#"labels."\xe7"!=x"#, true),
        ("name", true),
        ("parent", true),
        ("kind", false),
        ("kind==\"unheard of\"", false),
        ("kind!=active", true),
    ] {
        let filters = Filters::parse(&[filter]).expect("the filter is legal");
        assert_eq!(filters.matches(&subject), expected, "{filter}");
    }
}

#[test]
fn values_are_bytes() {
    check(&[
        (r#"name=="\x62\x61\x72""#, &[1, 3]),
        (r#"name=="bar\xff""#, &[]),
        (r#"name!="\xff""#, ALL),
        (r#"name=="bar\x00""#, &[]),
    ]);
    check_refused(&[
        (r#"name~="\xff""#, 6, "a regular expression that is UTF-8"),
        (r"name~=/a\200/", 6, "a regular expression that is UTF-8"),
    ]);
    assert_eq!(matched(&[r"name~=/^\142/"]), [1, 3, 6, 7]);
}

#[test]
fn several_filters_are_alternatives() {
    assert_eq!(matched(&[]), ALL);
    assert_eq!(matched(&["name==bar", "labels.foo==true"]), [0, 1, 3]);
    assert_eq!(matched(&["name==bar", ""]), ALL);
    assert!(matched(&["labels.nothing", "unknown"]).is_empty());
    let error = Filters::parse(&["", "name==bar", "name=="]).expect_err("the last is illegal");
    assert!(error.to_string().contains("\"name==\""), "{error}");
}

#[test]
fn only_no_filter_or_an_empty_one_is_all() {
    let is_all = |filters: &[&str]| Filters::parse(filters).expect("legal filters").is_all();
    assert!(is_all(&[]));
    assert!(is_all(&[""]));
    assert!(is_all(&["labels.foo", ""]));
    assert!(!is_all(&["labels.foo"]));
    assert!(!is_all(&["name"]));
    assert!(Filters::parse(&[String::new()]).expect("legal").is_all());
}

#[test]
fn white_space() {
    check(&[
        (" name", ALL),
        ("name ==bar", &[1, 3]),
        ("name == bar", &[1, 3]),
        ("name==\t\u{3000}bar", &[1, 3]),
        ("name==bar, labels.bar", &[3]),
        ("labels. bar", &[3]),
    ]);
    check_refused(&[
        (" ", 1, "a field name, bare or in double quotes"),
        ("name ", 5, "one of the operators ==, != and ~="),
        ("name ,name", 5, "one of the operators ==, != and ~="),
        ("labels .bar", 7, "one of the operators ==, != and ~="),
        ("name==bar ", 9, "a comma or the end of the filter"),
        ("name==bar ,name", 9, "a comma or the end of the filter"),
        ("name==\"bar\" ", 11, "a comma or the end of the filter"),
    ]);
}

#[test]
fn refusals() {
    check_refused(&[
        (
            "labels.|foo|==omg_asdf.asdf-qwer",
            7,
            "a field name with no quotes other than \" around it",
        ),
        (
            r#"labels.?"more complex label with \\ and \"".post==present"#,
            7,
            "a field name, bare or in double quotes",
        ),
        ("name==foo,", 10, "a field name, bare or in double quotes"),
        ("labels.", 7, "a field name, bare or in double quotes"),
        ("image~=,id?=?fbaq", 7, "a value, bare or in quotes"),
        (
            "labels.ns/key==value",
            9,
            "a closing / on the same line for the quote opened here",
        ),
        (
            "labels.key==/value",
            12,
            "a closing / on the same line for the quote opened here",
        ),
        (
            "name==/bar/",
            6,
            "a value with no quotes other than \" around it",
        ),
        (
            "name!=|bar|",
            6,
            "a value with no quotes other than \" around it",
        ),
        ("name=bar", 4, "one of the operators ==, != and ~="),
        ("name===bar", 4, "one of the operators ==, != and ~="),
        ("name~bar", 4, "one of the operators ==, != and ~="),
        ("name\"bar\"", 4, "one of the operators ==, != and ~="),
        ("name==", 6, "a value, bare or in quotes"),
        ("name== ", 7, "a value, bare or in quotes"),
        ("name==.bar", 6, "a value, bare or in quotes"),
        ("==bar", 0, "a field name, bare or in double quotes"),
        (".name", 0, "a field name, bare or in double quotes"),
        ("'name'", 0, "a field name, bare or in double quotes"),
        ("naïve", 2, "one of the operators ==, != and ~="),
        ("na\0me", 2, "text without NUL characters"),
        (
            "name==\u{fffd}",
            6,
            "text without the replacement character U+FFFD",
        ),
        ("name==a\u{fffd}", 7, "a comma or the end of the filter"),
        ("name==\"a\"b", 9, "a comma or the end of the filter"),
        ("name==\"a\"\"b\"", 9, "a comma or the end of the filter"),
        (r#"name=="\q""#, 7, "a legal escape sequence"),
    ]);
}

#[test]
fn broken_regular_expressions_are_refused() {
    let message = refusal("labels.a,name~=/a(b/");
    assert!(
        message.starts_with(
            "invalid filter \"labels.a,name~=/a(b/\": at byte 15: \
             expected a regular expression that compiles ("
        ),
        "{message}"
    );
    assert!(refusal("name~=/a{1000000}/").contains("size limit"));
}

#[test]
fn the_number_of_regular_expressions_is_bounded() {
    let one = "name~=a";
    let many = |count: usize| vec![one; count].join(",");
    assert!(Filters::parse(&[many(pattern::MAX_PATTERNS)]).is_ok());
    assert!(Filters::parse(&[many(pattern::MAX_PATTERNS + 1)]).is_err());
    assert!(Filters::parse(&vec![one; pattern::MAX_PATTERNS]).is_ok());
    let error = Filters::parse(&vec![one; pattern::MAX_PATTERNS + 1]).expect_err("too many");
    assert!(
        error
            .to_string()
            .ends_with("at byte 6: expected at most 64 regular expressions in a request"),
        "{error}"
    );
}
