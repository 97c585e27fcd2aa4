"""Many adapters of one base: banks, caches, routed calls and routers."""
