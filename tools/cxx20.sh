#!/bin/sh
# The C++ compiler, with the last word on two options: mmcv 2.1 asks for C++17 while the headers of torch 2.14 need C++20,
# and Python asks for debug symbols, which double the time that mmcv takes to compile.
exec ${MMCV_CXX:-c++} "$@" -std=c++20 -g0
