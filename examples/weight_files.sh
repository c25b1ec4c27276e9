# Bare weight files: no network is needed. `params.npy` is a matrix of floats.
set -e
penjing inspect params.npy
penjing prune params.npy --sparsity 50% -o sparse.npy
penjing quantize params.npy --bits 4 --group 32 -o codes.npz
penjing quantize codes.npz --dequantize -o floats.npy
