// The floating-point environment of a kernel: round to nearest, subnormal numbers kept. A caller may have set
// its thread otherwise (torch.set_flush_denormal does), and bits must not depend on that.
#pragma once
#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace tokenstep::cpu {

// Sets the default environment of this thread, and restores what it found.
class FpEnvironment {
 public:
  FpEnvironment(const FpEnvironment&) = delete;
  FpEnvironment& operator=(const FpEnvironment&) = delete;
#if defined(__x86_64__)
  FpEnvironment() : saved_(_mm_getcsr()) {
    if ((saved_ & ~kFlags) != kDefault) _mm_setcsr(kDefault);
  }
  ~FpEnvironment() {
    if ((saved_ & ~kFlags) != kDefault) _mm_setcsr(saved_);
  }

 private:
  static constexpr unsigned kDefault = 0x1f80,
                            kFlags = 0x3f;  // all exceptions masked; sticky flags do not matter
  unsigned saved_;
#else
  FpEnvironment() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
  }
  ~FpEnvironment() { fesetenv(&saved_); }

 private:
  fenv_t saved_;
#endif
};

}  // namespace tokenstep::cpu
