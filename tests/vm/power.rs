//! Power cuts at any moment of a load: everything that the daemon has
//! acknowledged has to be there afterwards, whole, and nothing may be half
//! there.
//!
//! The machine then continues with the same disks, so that damage adds up, and
//! from time to time with new ones.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::Options;
use crate::load::BEGUN;
use crate::machine::Disks;
use crate::model::{History, Record};
use crate::support::daemon::Daemon;
use crate::support::random::Random;
use crate::verify::{Verdict, require_sound, verify};

/// The number of series of cuts, which may run at once.
pub const SERIES: u32 = 4;
/// How many cuts the same disks go through.
const CUTS_OF_DISKS: u32 = 5;
const MEBIBYTES: u64 = 2048;
/// After how many cuts without a flush layers must be damaged.
const MOST_CONTROL_CUTS: u32 = 10;

/// Checks that nothing is lost with the daemon as it is, in one of [`SERIES`].
pub fn nothing_acknowledged_is_lost(options: Options, number: u32) {
    let cuts = (options.cuts + SERIES - 1 - number) / SERIES;
    let mut series = Series::new(format!("power {number}"), number, options, "commit");
    for cut in 0..cuts {
        let verdict = series.cut(cut);
        assert!(
            verdict.findings.is_empty(),
            "cut {cut}, --seed {}:\n{}",
            options.seed,
            verdict.findings.join("\n")
        );
    }
    series.report(cuts);
}

/// The control: with a daemon that flushes no layers, the same cuts have to
/// damage some. If they did not, the test above would prove nothing.
pub fn without_flush_layers_are_lost(options: Options) {
    let mut series = Series::new("power-control".to_owned(), SERIES, options, "none");
    for cut in 0..MOST_CONTROL_CUTS {
        let verdict = series.cut(cut);
        if !verdict.damaged.is_empty() {
            series.report(cut + 1);
            println!("power-control: for example {}", verdict.findings[0]);
            return;
        }
    }
    panic!(
        "{MOST_CONTROL_CUTS} power cuts without a flush have damaged nothing: these tests prove nothing"
    );
}

/// A series of cuts.
struct Series {
    name: String,
    seed: u64,
    load_ms: (u64, u64),
    sync: &'static str,
    random: Random,
    disks: Option<Disks>,
    history: History,
    begun: Instant,
    acknowledged: usize,
    verified: usize,
    damaged: usize,
}

impl Series {
    fn new(name: String, number: u32, options: Options, sync: &'static str) -> Series {
        println!("{name}: --seed {}", options.seed);
        // Each series has a load of its own.
        let seed = options.seed.wrapping_add(u64::from(number));
        Series {
            name,
            seed,
            load_ms: options.driver.load_ms,
            sync,
            random: Random::new(seed),
            disks: None,
            history: History::default(),
            begun: Instant::now(),
            acknowledged: 0,
            verified: 0,
            damaged: 0,
        }
    }

    /// Boots, loads, cuts the power and looks at what is left.
    fn cut(&mut self, cut: u32) -> Verdict {
        if cut.is_multiple_of(CUTS_OF_DISKS) {
            self.disks = None;
            self.history = History::default();
        }
        let disks = self.disks.get_or_insert_with(|| Disks::new(MEBIBYTES));
        let mut arguments = vec![
            "--root-dir".to_owned(),
            format!("{}/root", disks.image().display()),
            "--writable-dir".to_owned(),
            format!("{}/writable", disks.writable().display()),
        ];
        // The database is on either disk in turn, because a flush of the
        // database also flushes the names on its own disk.
        if cut / CUTS_OF_DISKS % 2 == 1 {
            arguments.push("--state-dir".to_owned());
            arguments.push(format!("{}/state", disks.writable().display()));
        }
        let places = arguments.clone();
        arguments.extend(["--sync", self.sync].map(str::to_owned));
        // Every second time, layers are moving.
        let relocate_after = if cut.is_multiple_of(2) { "1" } else { "600" };
        arguments.extend(["--relocate-after", relocate_after].map(str::to_owned));

        let mut machine = disks.boot(&[
            ("VM_WORK", "load".to_owned()),
            ("VM_SEED", self.seed.to_string()),
            ("VM_BOOT", cut.to_string()),
            ("VM_DAEMON", arguments.join(",")),
        ]);
        machine.wait_for(BEGUN);
        let (least, more) = self.load_ms;
        sleep(Duration::from_millis(least + self.random.below(more)));
        let lines = machine.cut();
        let before = self.history.layers;
        self.history
            .read(lines.iter().filter_map(|line| Record::from_line(line)));

        disks.mount();
        let mut looking = places.clone();
        // Nothing may move during the comparison.
        looking.extend(["--relocate", "never", "--upperdir-label"].map(str::to_owned));
        let mut daemon = Daemon::start(&looking);
        let verdict = verify(&daemon.client(), self.seed, &mut self.history);
        daemon.stop();
        if verdict.findings.is_empty() {
            require_sound(&places);
        }
        disks.unmount();

        self.acknowledged += self.history.layers - before;
        self.verified += verdict.layers;
        self.damaged += verdict.damaged.len();
        verdict
    }

    fn report(&self, cuts: u32) {
        println!(
            "{}: {cuts} cuts, {} layers acknowledged, {} verified, {} damaged, {} s",
            self.name,
            self.acknowledged,
            self.verified,
            self.damaged,
            self.begun.elapsed().as_secs()
        );
    }
}
