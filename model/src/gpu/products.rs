//! Which way a pass multiplies each of its weights by few rows: by cuBLAS or by the kernel for them, whichever took less
//! time on this device.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Result, bail};

use super::kernels::{FEW_ROWS_SIZES, Outputs};
use crate::without_backtrace;

/// What a pass multiplies by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Projection {
    Qkv,
    O,
    GateUp,
    Down,
    Head,
}

impl Projection {
    pub const ALL: [Self; 5] = [Self::Qkv, Self::O, Self::GateUp, Self::Down, Self::Head];
}

/// How a product is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Blas,
    FewRows(Outputs),
}

impl Way {
    const ALL: [Self; 3] = [
        Self::Blas,
        Self::FewRows(Outputs::Sixteen),
        Self::FewRows(Outputs::ThirtyTwo),
    ];
}

/// cuBLAS is chosen where it takes less than so much of the kernel's time: the kernel gives a row the same sums in every
/// batch that it computes, and the choice shall not hang on noise.
const CLEARLY_FASTER: f64 = 0.95;

/// Names the way for all products of few rows, `blas` or `kernel`, instead of measuring.
const VARIABLE: &str = "LENGTHWISE_GPU_PRODUCTS";

/// The ways of a model's products on a device.
#[derive(Debug, Clone)]
pub(crate) struct Products {
    /// For each number of rows that the kernel is compiled for.
    ways: [[Way; Projection::ALL.len()]; FEW_ROWS_SIZES.len()],
    /// For passes of up to so many rows they are chosen: by measurement, or because there is nothing to choose.
    chosen: usize,
}

/// The ways that all caches of a network take: measured for the first, they serve the others. Networks that are made of one
/// another share them, since no time hangs on what the weights are.
#[derive(Debug, Clone, Default)]
pub(crate) struct SharedProducts(Arc<Mutex<Option<Products>>>);

impl SharedProducts {
    /// The ways, chosen for passes of up to `rows` rows: by an earlier cache, or by measurement now, where others wait for it.
    ///
    /// - `time`: as [`Products::measure`] takes it; where it fails, cuBLAS computes all
    ///
    /// # Errors
    /// The environment names a way that there is not.
    pub fn choose(
        &self,
        dtype: DType,
        rows: usize,
        time: impl FnMut(Projection, usize, Way) -> Result<Option<f64>>,
    ) -> Result<Products> {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut products = match &*shared {
            Some(products) => products.clone(),
            None => Products::new(dtype)?,
        };
        if let Err(err) = products.measure(rows, time) {
            let err = without_backtrace(err);
            tracing::warn!("products of few rows cannot be timed on this GPU, so cuBLAS computes them: {err}");
            products = Products::by_blas();
        }
        Ok(shared.insert(products).clone())
    }
}

impl Products {
    /// Before anything is measured: the kernel, with small tiles for the weights that have many.
    ///
    /// # Errors
    /// The environment names a way that there is not.
    fn new(dtype: DType) -> Result<Self> {
        let named = std::env::var(VARIABLE).ok();
        let (kernel, chosen) = match named.as_deref() {
            _ if dtype.size_in_bytes() != 2 => (false, true),
            None => (true, false),
            Some("kernel") => (true, true),
            Some("blas") => (false, true),
            Some(other) => bail!("{VARIABLE}={other}: blas and kernel are the ways there are"),
        };
        let way = |projection: Projection| match projection {
            _ if !kernel => Way::Blas,
            Projection::Qkv | Projection::GateUp | Projection::Head => Way::FewRows(Outputs::Sixteen),
            Projection::O | Projection::Down => Way::FewRows(Outputs::ThirtyTwo),
        };
        Ok(Self {
            ways: [Projection::ALL.map(way); FEW_ROWS_SIZES.len()],
            chosen: if chosen { usize::MAX } else { 0 },
        })
    }

    /// All by cuBLAS.
    fn by_blas() -> Self {
        Self {
            ways: [[Way::Blas; Projection::ALL.len()]; FEW_ROWS_SIZES.len()],
            chosen: usize::MAX,
        }
    }

    /// How `rows` rows are multiplied by a weight.
    pub fn way(&self, projection: Projection, rows: usize) -> Way {
        FEW_ROWS_SIZES
            .iter()
            .position(|size| rows <= *size)
            .map_or(Way::Blas, |size| self.ways[size][projection as usize])
    }

    /// Chooses by measurement for passes of up to `rows` rows, where that is not done and says anything.
    ///
    /// - `time`: seconds that a weight's products take in a way, with so many rows
    ///
    /// # Errors
    /// `time`'s.
    fn measure(
        &mut self,
        rows: usize,
        mut time: impl FnMut(Projection, usize, Way) -> Result<Option<f64>>,
    ) -> Result<()> {
        let mut smaller = 0;
        for (ways, size) in self.ways.iter_mut().zip(FEW_ROWS_SIZES) {
            let timed = size.min(rows);
            // No pass has as many, or they were timed before.
            let needless = rows <= std::mem::replace(&mut smaller, size) || timed <= self.chosen;
            if needless {
                continue;
            }
            for projection in Projection::ALL {
                let mut seconds = [0.0; Way::ALL.len()];
                for (way, seconds) in Way::ALL.iter().zip(&mut seconds) {
                    let Some(measured) = time(projection, timed, *way)? else {
                        return Ok(());
                    };
                    *seconds = measured;
                }
                ways[projection as usize] = fastest(seconds);
                tracing::debug!(?projection, rows = size, ?seconds, chosen = ?ways[projection as usize], "product");
            }
        }
        self.chosen = self.chosen.max(rows);
        Ok(())
    }
}

/// Of the seconds of [`Way::ALL`].
fn fastest(seconds: [f64; Way::ALL.len()]) -> Way {
    let [blas, small, large] = seconds;
    match () {
        () if blas < CLEARLY_FASTER * small.min(large) => Way::Blas,
        () if small <= large => Way::FewRows(Outputs::Sixteen),
        () => Way::FewRows(Outputs::ThirtyTwo),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_weight_is_multiplied_the_way_that_took_least() -> Result<()> {
        let mut products = Products::new(DType::BF16)?;
        // cuBLAS wins by far for the head, and not clearly for the others; large tiles win for 8 rows.
        products.measure(13, |projection, rows, way| {
            Ok(Some(match way {
                Way::Blas if projection == Projection::Head => 0.5,
                Way::Blas => 0.96,
                Way::FewRows(Outputs::Sixteen) => 1.0,
                Way::FewRows(Outputs::ThirtyTwo) => 1.0 + (rows as f64 - 8.5) / 10.0,
            }))
        })?;
        let kernel = Way::FewRows;
        assert_eq!(products.way(Projection::Head, 3), Way::Blas);
        assert_eq!(products.way(Projection::O, 8), kernel(Outputs::ThirtyTwo));
        assert_eq!(products.way(Projection::O, 9), kernel(Outputs::Sixteen));
        // More rows than a pass may have were not measured; more than the kernel takes are cuBLAS'.
        assert_eq!(products.way(Projection::Down, 32), kernel(Outputs::ThirtyTwo));
        assert_eq!(products.way(Projection::Down, 33), Way::Blas);
        Ok(())
    }

    #[test]
    fn what_one_cache_measured_serves_the_others() -> Result<()> {
        let shared = SharedProducts::default();
        let timed = std::cell::RefCell::new(Vec::new());
        let choose = |rows| {
            let products = shared.choose(DType::BF16, rows, |_, rows, _| {
                timed.borrow_mut().push(rows);
                Ok(Some(1.0))
            })?;
            timed.borrow_mut().dedup();
            Ok::<_, candle_core::Error>((products, timed.take()))
        };
        let (unmeasured, none) = choose(0)?;
        assert_eq!((unmeasured.chosen, none), (0, vec![]));
        assert_eq!(choose(13)?.1, [8, 13]);
        assert!(choose(13)?.1.is_empty());
        // Larger passes: what is new about them alone.
        assert_eq!(choose(14)?.1, [14]);
        assert_eq!(choose(300)?.1, [16, 32]);
        assert!(choose(400)?.1.is_empty());
        Ok(())
    }

    #[test]
    fn where_one_cannot_be_timed_all_are_of_cublas() -> Result<()> {
        let shared = SharedProducts::default();
        let failed = shared.choose(DType::BF16, 8, |_, _, _| bail!("no events"))?;
        let after = shared.choose(DType::BF16, 300, |_, _, _| bail!("it is not tried again"))?;
        for products in [failed, after] {
            assert_eq!(products.way(Projection::Qkv, 8), Way::Blas);
        }
        Ok(())
    }

    #[test]
    fn the_kernel_takes_no_f32() -> Result<()> {
        let products = Products::new(DType::F32)?;
        assert_eq!(products.chosen, usize::MAX);
        assert_eq!(products.way(Projection::Qkv, 1), Way::Blas);
        Ok(())
    }
}
