#!/bin/sh
# The C++ compiler, with C++20 as the last word: mmcv 2.1 asks for C++17, the headers of torch 2.14 need C++20.
exec c++ "$@" -std=c++20
