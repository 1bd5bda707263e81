cdef extern from *:
    """
    #if defined(__clang__)
    #define CATTN_COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
    #define CATTN_COMPILER "gcc " __VERSION__
    #else
    #define CATTN_COMPILER "unknown"
    #endif
    #if !defined(_OPENMP)
    #define CATTN_OPENMP "none (the compiler has none): one thread"
    #elif defined(__clang__)
    #define CATTN_OPENMP "libomp"
    #else
    #define CATTN_OPENMP "libgomp"
    #endif
    #ifdef _OPENMP
    #define CATTN_OPENMP_DATE _OPENMP
    #else
    #define CATTN_OPENMP_DATE 0
    #endif
    """
    const char* CATTN_COMPILER
    const char* CATTN_OPENMP
    const int CATTN_OPENMP_DATE


def build_info():
    """How this module was built."""
    openmp = CATTN_OPENMP.decode()
    return {
        "compiler": CATTN_COMPILER.decode(),
        "openmp": f"{openmp} (specification {CATTN_OPENMP_DATE})" if CATTN_OPENMP_DATE else openmp,
    }
