//! Networks side by side: what was measured of each system's, and what is promised of ours.
#![allow(clippy::cast_precision_loss, reason = "bytes and nanoseconds are fewer than 2^52")]

use std::time::Duration;

use serde::Serialize;

/// What it took to do something so often.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Work {
    /// How often: bytes, connections, questions.
    pub count: u64,
    /// How long it took.
    pub time: Duration,
    /// Of that, the threads that are the guest's processors: the guest, and what KVM does for it.
    pub guest: Duration,
    /// All other threads of its virtual machine monitor.
    pub monitor: Duration,
}

impl Work {
    /// What has been used since an earlier moment.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            guest: self.guest.saturating_sub(before.guest),
            monitor: self.monitor.saturating_sub(before.monitor),
            ..Self::default()
        }
    }
}

/// One measurement, again and again.
#[derive(Clone, Debug, Serialize)]
struct Row {
    name: String,
    rounds: Vec<Work>,
}

impl Row {
    /// Nanoseconds each: the median of all time, and of all rounds together what the guest's processors and the monitor's other
    /// threads had, whose clock is coarse.
    fn each(&self) -> [f64; 3] {
        let nanoseconds = |work: &Work| work.time.as_secs_f64() * 1e9 / work.count as f64;
        let count: u64 = self.rounds.iter().map(|work| work.count).sum();
        let mean = |part: fn(&Work) -> Duration| {
            self.rounds.iter().map(|work| part(work).as_secs_f64()).sum::<f64>() * 1e9 / count as f64
        };
        let median = median(self.rounds.iter().map(nanoseconds).collect());
        [median, mean(|work| work.guest), mean(|work| work.monitor)]
    }
}

/// What was measured of a system.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    system: String,
    rows: Vec<Row>,
}

impl Figures {
    /// None yet.
    #[must_use]
    pub fn new(system: &str) -> Self {
        Self { system: system.to_owned(), rows: vec![] }
    }

    /// What was measured last, for whoever waits for the rest.
    #[must_use]
    pub fn newest(&self) -> String {
        self.rows.last().map_or_else(String::new, |row| {
            let [time, guest, monitor] = row.each();
            format!("{}: {time:.2} ns each; guest {guest:.2}, monitor {monitor:.2}", row.name)
        })
    }

    /// One round of what is called so.
    pub fn add(&mut self, name: &str, work: Work) {
        match self.rows.iter_mut().find(|row| row.name == name) {
            Some(row) => row.rounds.push(work),
            None => self.rows.push(Row { name: name.to_owned(), rounds: vec![work] }),
        }
    }
}

/// A table for people: how many a second, and nanoseconds each: in all, of the guest's processors, and of the monitor's other threads.
#[must_use]
pub fn table(all: &[Figures]) -> String {
    let mut table = format!("{:36}", "each second; ns each");
    for figures in all {
        table.push_str(&format!("{:>40}", figures.system));
    }
    table.push('\n');
    let names = all.first().map(|first| first.rows.as_slice()).unwrap_or_default();
    for (number, Row { name, .. }) in names.iter().enumerate() {
        table.push_str(&format!("{name:36}"));
        for figures in all {
            let [time, guest, monitor] = figures.rows.get(number).map_or([f64::NAN; 3], Row::each);
            table.push_str(&format!("{:>11.0} {time:>9.2} {guest:>9.2} {monitor:>8.2}", 1e9 / time));
        }
        table.push('\n');
    }
    table
}

/// How many times as many bytes, and as many of all else, as each other the first system has to do.
const AHEAD_IN_BYTES: f64 = 2.0;
const AHEAD: f64 = 1.0;

/// A line for each row in which the first system is not ahead of another by as much as is promised.
#[must_use]
pub fn broken_promises(all: &[Figures]) -> Vec<String> {
    let Some((ours, others)) = all.split_first() else { return vec!["nothing was measured".into()] };
    let mut broken = Vec::new();
    for other in others {
        for (mine, theirs) in ours.rows.iter().zip(&other.rows) {
            let ([mine_ns, ..], [theirs_ns, ..]) = (mine.each(), theirs.each());
            let ahead = theirs_ns / mine_ns;
            let promised = if mine.name.ends_with("bytes") { AHEAD_IN_BYTES } else { AHEAD };
            if ahead.is_nan() || ahead < promised {
                broken.push(format!("{}: {ahead:.2} times as many as {}", mine.name, other.system));
            }
        }
    }
    broken
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(system: &str, bytes: [u64; 3], connections: u64) -> Figures {
        let mut figures = Figures::new(system);
        let second = Work { time: Duration::from_secs(1), ..Work::default() };
        for count in bytes {
            figures.add("bytes", Work { count, guest: Duration::from_millis(500), ..second });
        }
        figures.add("connections", Work { count: connections, ..second });
        figures
    }

    #[test]
    fn what_is_not_ahead_by_as_much_as_is_promised_is_named() {
        let all = [figures("a", [1, 2000, 9000], 1000), figures("b", [7000, 1000, 0], 700)];
        assert_eq!(broken_promises(&all), Vec::<String>::new());
        let other = [all[0].clone(), figures("b", [7000, 1500, 0], 1100)];
        let broken = ["bytes: 1.33 times as many as b", "connections: 0.91 times as many as b"];
        assert_eq!(broken_promises(&other), broken);
        assert!(broken_promises(&all[..1]).is_empty());
        assert_eq!(broken_promises(&[]).len(), 1);
        let table = table(&all[..1]);
        assert!(table.lines().nth(1).unwrap().contains(" 2000 500000.00 136351.24"), "{table}");
    }
}
