//! Durations of one thing measured again and again.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

/// Durations by what was measured, in the order of first measurement.
#[derive(Debug, Default)]
pub struct Samples {
    order: Vec<String>,
    by_name: BTreeMap<String, Vec<Duration>>,
}

/// What is said of one series, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// What was measured.
    pub name: String,
    /// How often.
    pub count: usize,
    /// The median.
    pub p50_ms: f64,
    /// 99 of 100 are not above it.
    pub p99_ms: f64,
    /// The smallest.
    pub min_ms: f64,
}

/// All series of one run, as the JSON file has them.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// `wall` or `instructions`: on the instruction clock one instruction is one nanosecond.
    pub clock: String,
    /// In the order of measurement.
    pub series: Vec<Summary>,
}

impl Samples {
    /// Adds one measurement.
    pub fn add(&mut self, name: &str, time: Duration) {
        if !self.by_name.contains_key(name) {
            self.order.push(name.to_owned());
        }
        self.by_name.entry(name.to_owned()).or_default().push(time);
    }

    /// One summary for each series.
    pub fn report(mut self, clock: &str) -> Report {
        let series = self.order.iter().filter_map(|name| {
            let times = self.by_name.get_mut(name)?;
            times.sort_unstable();
            Some(Summary {
                name: name.clone(),
                count: times.len(),
                p50_ms: percentile(times, 50)?,
                p99_ms: percentile(times, 99)?,
                min_ms: percentile(times, 0)?,
            })
        });
        Report { clock: clock.to_owned(), series: series.collect() }
    }
}

impl Report {
    /// The summary of one series.
    pub fn get(&self, name: &str) -> Option<&Summary> {
        self.series.iter().find(|summary| summary.name == name)
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut table = format!(
            "clock: {}\n{:24} {:>5} {:>10} {:>10} {:>10}\n",
            self.clock, "", "n", "p50 ms", "p99 ms", "min ms"
        );
        for Summary { name, count, p50_ms, p99_ms, min_ms } in &self.series {
            table.push_str(&format!("{name:24} {count:>5} {p50_ms:>10.3} {p99_ms:>10.3} {min_ms:>10.3}\n"));
        }
        table
    }
}

/// The smallest value that `percent` of the sorted `times` do not exceed, in milliseconds.
fn percentile(times: &[Duration], percent: usize) -> Option<f64> {
    let rank = (times.len() * percent).div_ceil(100).max(1);
    times.get(rank - 1).map(|time| time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let mut samples = Samples::default();
        for ms in (1..=200).rev() {
            samples.add("a", Duration::from_millis(ms));
        }
        samples.add("b", Duration::from_millis(7));
        let report = samples.report("wall");
        let a = report.get("a").unwrap();
        assert_eq!((a.count, a.p50_ms, a.p99_ms, a.min_ms), (200, 100.0, 198.0, 1.0));
        let b = report.get("b").unwrap();
        assert_eq!((b.p50_ms, b.p99_ms, b.min_ms), (7.0, 7.0, 7.0));
        assert_eq!(report.series.first().map(|summary| summary.name.as_str()), Some("a"));
    }
}
