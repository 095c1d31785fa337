from setuptools import setup

setup(
    name="magcache",
    version="0.1.0",
    description="MagCache for Wan2.1: faster video generation by reusing transformer residuals",
    license="Apache-2.0",
    python_requires=">=3.10",
    # not `wan`: it would hide the one of a Wan2.1 checkout
    packages=["magcache", "magcache.app", "magcache.app.trials"],
    package_data={"magcache": ["ratios/*.json"], "magcache.app": ["page.html"]},
    install_requires=["torch>=2.4", "numpy"],
    extras_require={
        "bench": ["diffusers>=0.42", "scikit-image>=0.22", "scipy", "matplotlib"],
        "compare": ["scikit-image>=0.22", "matplotlib", "imageio-ffmpeg", "Pillow>=10.1"],
        "plot": ["matplotlib"],
    },
)
