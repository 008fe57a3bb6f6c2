// Shared memory is declared by name, so that a build without a GPU can put an allocation of its own in its place.
#pragma once

#ifndef LORS_SHARED
#define LORS_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define LORS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif
