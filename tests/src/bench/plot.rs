//! Charts: a case each, a bar for each system.

use std::{error::Error, path::Path};

use plotters::prelude::*;

use super::report::{Report, Run};

const WIDTH: u32 = 840;
const ROW: u32 = 26;
const TOP: u32 = 56;
/// Where bars begin, and the length of the longest.
const LEFT: u32 = 236;
const LONGEST: f64 = 480.0;
const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const OTHERS: RGBColor = RGBColor(0xb0, 0xb8, 0xc0);

/// Writes a chart of each case into a directory, by the names that the report's tables give them.
///
/// # Errors
///
/// When a file cannot be written.
pub fn write(report: &Report, dir: &Path) -> Result<(), Box<dyn Error>> {
    for case in report.cases() {
        chart(&dir.join(report.chart(case)), case, &report.kernel, &report.of(case))?;
    }
    Ok(())
}

fn chart(path: &Path, case: &str, kernel: &str, runs: &[&Run]) -> Result<(), Box<dyn Error>> {
    let height = TOP + ROW * runs.len() as u32 + 10;
    let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let unit = runs.first().map_or("", |run| run.unit.as_str());
    let title = ("sans-serif", 17).into_font().color(&BLACK);
    let label = ("sans-serif", 13).into_font().color(&BLACK);
    area.draw(&Text::new(format!("{case}: {unit}, less is better"), (12, 10), title))?;
    area.draw(&Text::new(format!("kernel {kernel}"), (12, 32), label.clone()))?;
    let most = runs.iter().map(|run| run.median).fold(1.0, f64::max);
    for (row, run) in (0_u32..).zip(runs) {
        let y = (TOP + ROW * row) as i32;
        let length = (run.median / most * LONGEST) as i32;
        let color = if run.system.starts_with("eniway") { OURS } else { OTHERS };
        let left = LEFT as i32;
        area.draw(&Rectangle::new([(left, y), (left + length, y + ROW as i32 - 8)], color.filled()))?;
        area.draw(&Text::new(run.system.clone(), (12, y + 3), label.clone()))?;
        area.draw(&Text::new(format!("{:.0}", run.median), (left + length + 6, y + 3), label.clone()))?;
    }
    area.present()?;
    Ok(())
}
