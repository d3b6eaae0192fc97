//! All layers of a training pass on the GPU as one operation of candle's graph.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Storage, Tensor, bail};

use super::inputs::PassInputs;
use super::layer::{GpuLayer, Reads};
use super::pool::Rows;
use super::{Device, Place};
use crate::lora::{self, AdaptedRows, Adapter, Dropout, Terms};
use crate::network::{Keeps, Stack, rows_within};

/// What the layers of one training pass share.
pub(crate) struct GpuTraining<'a> {
    pub device: Arc<Device>,
    /// Tokens of each sequence, and each token's position in its own.
    pub lengths: &'a [usize],
    pub positions: &'a [u32],
    /// Packed rows that are read of the last layer, ascending.
    pub read: &'a [u32],
    pub adapter: Option<&'a Adapter>,
    /// The rows that it changes, where that is not all.
    pub adapted: Option<&'a AdaptedRows>,
    pub dropout: Option<&'a Dropout>,
    /// Keep the layers' inputs alone for the backward pass, which runs each layer again.
    pub checkpointing: bool,
}

impl GpuTraining<'_> {
    /// The last layer's output, `[read, hidden]`.
    ///
    /// - `x`: `[tokens, hidden]`
    ///
    /// # Errors
    /// No memory, or the device failed.
    pub fn run(&self, x: &Tensor) -> Result<Tensor> {
        let (device, x) = (&self.device, x.contiguous()?);
        let numbers = 0..device.config.num_hidden_layers;
        let factors = lora::flat_factors(self.adapter, numbers.clone(), x.device())?;
        let keeps = Keeps::of(&x, &factors, self.checkpointing);
        let reads_all = self.read.len() == self.positions.len();
        let changed = rows_within(self.adapted, &x, &factors, reads_all);
        let scale = self.adapter.map_or(0.0, |adapter| adapter.config().scale() as f32);
        let inputs = PassInputs::new(
            device.lock().gpu(),
            device.dtype,
            (self.lengths, self.positions),
            (self.read, changed.as_deref()),
            (scale, self.adapted),
        )?;
        let (inputs, mut start) = (Arc::new(inputs), 0);
        let layers = numbers.clone().map(|number| {
            let terms = Terms::of(self.adapter, number, start)?;
            start = terms.end();
            Ok(GpuLayer {
                device: device.clone(),
                number,
                inputs: inputs.clone(),
                reads: if number + 1 == numbers.end {
                    Reads::Last
                } else {
                    Reads::All
                },
                dropout: self.dropout.and_then(Dropout::fork),
                terms,
            })
        });
        let stack = Stack::new(layers.collect::<Result<_>>()?, keeps);
        let output = stack.forward(&device.place(&x)?, &device.place(&factors)?)?;
        let output = device.tensor(output, &x, self.read.len())?;
        if keeps == Keeps::Nothing {
            // No step will follow that wants the memory at once.
            device.lock().clear();
            return Ok(output);
        }
        let op = Layers {
            device: device.clone(),
            stack,
            output: Mutex::new(Some(output)),
        };
        x.apply_op2(&factors, op)
    }
}

impl Device {
    fn place(&self, tensor: &Tensor) -> Result<Place> {
        Ok(Place {
            address: self.lock().gpu().address(tensor)?,
        })
    }

    /// A tensor of `rows` rows like those of `like`, with the values of `from`, which are given back.
    fn tensor(&self, from: Rows, like: &Tensor, rows: usize) -> Result<Tensor> {
        let width = like.dim(1)?;
        let tensor = Tensor::zeros((rows, width), like.dtype(), like.device())?;
        let to = self.place(&tensor)?;
        let mut on = self.lock();
        // SAFETY: both hold as many rows.
        unsafe {
            on.kernels()
                .place_rows(to.address, 0, from.address(), 0, (rows, width))?
        };
        on.give([from]);
        Ok(tensor)
    }
}

/// The layers behind their forward pass.
struct Layers {
    device: Arc<Device>,
    stack: Stack<GpuLayer>,
    /// What it gave, until candle takes it.
    output: Mutex<Option<Tensor>>,
}

impl Layers {
    fn output(&self) -> Result<Tensor> {
        match self.output.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(output) => Ok(output),
            None => bail!("the forward pass ran before and is not repeated"),
        }
    }
}

impl CustomOp2 for Layers {
    fn name(&self) -> &'static str {
        "decoder-layers-gpu"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let output = self.output()?;
        match &*output.storage_and_layout().0 {
            Storage::Cpu(storage) => Ok((storage.clone(), output.shape().clone())),
            _ => bail!("the layers ran on another device"),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let output = self.output()?;
        match &*output.storage_and_layout().0 {
            Storage::Cuda(storage) => Ok((storage.try_clone(output.layout())?, output.shape().clone())),
            _ => bail!("the layers ran on another device"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        factors: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (device, grad) = (&self.device, grad.contiguous()?);
        let dfactors = Tensor::zeros(factors.shape(), DType::F32, factors.device())?;
        let (at, values, above) = (device.place(x)?, device.place(factors)?, device.place(&grad)?);
        let mut to = device.place(&dfactors)?;
        let dx = self.stack.backward(&at, &values, &above, x.track_op(), &mut to)?;
        let dx = dx.map(|dx| device.tensor(dx, x, x.dim(0)?)).transpose()?;
        Ok((dx, factors.track_op().then_some(dfactors)))
    }
}
